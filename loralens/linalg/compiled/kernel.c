/* The inner loops of a merge into bfloat16, of products of thin factors and of passes over W, of TIES and DELLA and of
   sketches. They take a third to two thirds of the time of the NumPy code that is used where this file was not compiled,
   because a number stays in a register from one step to the next. Their results have the bits of that code, with two
   exceptions. The last bits of products of factors and of products with W differ, as they do between two libraries of
   BLAS. The last bits of transforms differ too, but are lost when the results are rounded to integers.

   Arrays come as buffers in C order: bfloat16 as 16 bits of unsigned integers, D and sums as float, factors as double.
   The sum of the products of an entry is exact (loralens/linalg/exact.py), so it may be formed in any order. */

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

/* The compiler makes one version for each of these processors; the first one that fits is taken when it is loaded.
   With -DWITHOUT_AVX512 the times on other processors can be measured on one that has it. */
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(WITHOUT_AVX512)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx2", "default")))
#elif defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_EVERY_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EVERY_PROCESSOR
#endif

enum { LINE = 64 };  /* bytes in a line of the cache, with which a tile begins */
enum { CHUNK = 64 }; /* entries that are rounded before they are compared */

/* The operands of D = B A + B2 A2: B (rows, rank), A (rank, columns); rank2 is 0 if there is no second pair. D has the
   type that a function below writes. */
typedef struct {
    const double *B, *A, *B2, *A2;
    Py_ssize_t rank, rank2, rows, columns;
    void *D;
} Product;

/* Defines a function that multiplies a product in tiles of ROWS × GROUPS vectors of LANES numbers, whose sums stay in
   registers. Vectors that are wider than the registers of the processor would be many times slower, so there is one
   function for each width. `tile` has room for WIDEST numbers of each rank index. The sums are rounded once to TYPE. */
#define DEFINE_MULTIPLY(NAME, TARGET, TYPE, LANES, ROWS, GROUPS)                                                        \
    typedef double NAME##_wide __attribute__((vector_size(8 * LANES), aligned(8), may_alias));                          \
    typedef TYPE NAME##_rounded __attribute__((vector_size(sizeof(TYPE) * LANES), aligned(4), may_alias));              \
    __attribute__((target(TARGET))) static void NAME(const Product *p, double *tile) {                                  \
        enum { WIDTH = LANES * GROUPS };                                                                                \
        for (Py_ssize_t column = 0; column < p->columns; column += WIDTH) {                                             \
            /* The last columns are computed again rather than one by one; there are at least WIDTH. */                 \
            Py_ssize_t left = p->columns - column < WIDTH ? p->columns - WIDTH : column;                                \
            double *next = tile;                                                                                        \
            for (Py_ssize_t k = 0; k < p->rank; k++, next += WIDTH)                                                     \
                memcpy(next, p->A + k * p->columns + left, WIDTH * sizeof(double));                                     \
            for (Py_ssize_t k = 0; k < p->rank2; k++, next += WIDTH)                                                    \
                memcpy(next, p->A2 + k * p->columns + left, WIDTH * sizeof(double));                                    \
            for (Py_ssize_t row = 0; row < p->rows; row += ROWS) {                                                      \
                Py_ssize_t top = p->rows - row < ROWS ? p->rows - ROWS : row;                                           \
                NAME##_wide sums[ROWS][GROUPS], second[ROWS][GROUPS];                                                   \
                SUM_PRODUCTS(NAME, p->B + top * p->rank, p->rank, tile, sums, LANES, ROWS, GROUPS)                      \
                if (p->rank2) {                                                                                         \
                    SUM_PRODUCTS(NAME, p->B2 + top * p->rank2, p->rank2, tile + p->rank * WIDTH, second, LANES, ROWS,   \
                                 GROUPS)                                                                                \
                    for (int i = 0; i < ROWS; i++)                                                                      \
                        for (int j = 0; j < GROUPS; j++)                                                                \
                            sums[i][j] += second[i][j];                                                                 \
                }                                                                                                       \
                TYPE *D = (TYPE *)p->D + top * p->columns + left;                                                       \
                _Pragma("GCC unroll 8") for (int i = 0; i < ROWS; i++, D += p->columns)                                 \
                    _Pragma("GCC unroll 8") for (int j = 0; j < GROUPS; j++)                                            \
                        *(NAME##_rounded *)(D + j * LANES) = __builtin_convertvector(sums[i][j], NAME##_rounded);       \
            }                                                                                                           \
        }                                                                                                               \
    }

/* Adds up the products of some rows, one rank index after the other. */
#define SUM_PRODUCTS(NAME, ROW, RANK, TILE, SUMS, LANES, ROWS, GROUPS)                                                  \
    {                                                                                                                   \
        const double *b = ROW, *a = TILE;                                                                               \
        const Py_ssize_t rank = RANK;                                                                                   \
        memset(SUMS, 0, sizeof SUMS);                                                                                   \
        for (Py_ssize_t k = 0; k < rank; k++, b++, a += LANES * GROUPS) {                                               \
            NAME##_wide line[GROUPS];                                                                                   \
            _Pragma("GCC unroll 8") for (int j = 0; j < GROUPS; j++) line[j] = *(const NAME##_wide *)(a + j * LANES);   \
            _Pragma("GCC unroll 8") for (int i = 0; i < ROWS; i++)                                                      \
                _Pragma("GCC unroll 8") for (int j = 0; j < GROUPS; j++) SUMS[i][j] += b[i * rank] * line[j];           \
        }                                                                                                               \
    }

/* Rows and columns of the tiles below, at most; the result of a map is a factor, and so has fewer than a weight. */
enum { MOST_ROWS = 6, WIDEST = 32, MAP_ROWS = 8, MAP_WIDTH = 16 };
#if defined(__x86_64__) && !defined(WITHOUT_AVX512)
DEFINE_MULTIPLY(multiply_avx512, "avx512f", float, 8, 4, 4)
DEFINE_MULTIPLY(map_avx512, "avx512f", double, 8, 8, 2)
#endif
#if defined(__x86_64__)
DEFINE_MULTIPLY(multiply_avx2, "avx2,fma", float, 4, 6, 2)
DEFINE_MULTIPLY(map_avx2, "avx2,fma", double, 4, 6, 2)
#endif

/* Writes D in double if `is_map`, else in float. Returns 0 where BLAS is quicker: the processor has none of the registers
   that a tile needs, or the product is too small. */
static int multiply(const Product *p, int is_map, double *tile) {
    if (is_map ? p->rows < MAP_ROWS || p->columns < MAP_WIDTH : p->rows < MOST_ROWS || p->columns < WIDEST)
        return 0;
#if defined(__x86_64__) && !defined(WITHOUT_AVX512)
    if (__builtin_cpu_supports("avx512f"))
        return (is_map ? map_avx512 : multiply_avx512)(p, tile), 1;
#endif
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return (is_map ? map_avx2 : multiply_avx2)(p, tile), 1;
#endif
    (void)tile;
    return 0;
}

/* Defines two functions for the inner products of factors, as BLAS is slow on thin ones: NAME_columns computes XᵀY of
   X (m, r) and Y (m, k), and NAME_rows computes X Yᵀ of X (r, n) and Y (k, n), where LANES divides n. Tiles of
   ROWS × GROUPS vectors, and of HIGH × WIDE sums of a vector each, stay in registers. r and k are at least SMALLEST. Of a
   Gram matrix only the tiles that reach the `upper` triangle are computed. */
#define DEFINE_GRAM(NAME, TARGET, LANES, ROWS, GROUPS, HIGH, WIDE)                                                      \
    typedef double NAME##_wide __attribute__((vector_size(8 * LANES), aligned(8), may_alias));                          \
    __attribute__((target(TARGET))) static void NAME##_columns(const double *X, const double *Y, Py_ssize_t m,          \
                                                               Py_ssize_t r, Py_ssize_t k, int upper, double *G) {      \
        enum { WIDTH = LANES * GROUPS };                                                                                \
        for (Py_ssize_t i = 0; i < r; i += ROWS) {                                                                      \
            Py_ssize_t top = r - i < ROWS ? r - ROWS : i;                                                               \
            for (Py_ssize_t j = upper ? top / WIDTH * WIDTH : 0; j < k; j += WIDTH) {                                   \
                Py_ssize_t left = k - j < WIDTH ? k - WIDTH : j;                                                        \
                NAME##_wide sums[ROWS][GROUPS];                                                                         \
                memset(sums, 0, sizeof sums);                                                                           \
                const double *x = X + top, *y = Y + left;                                                               \
                for (Py_ssize_t row = 0; row < m; row++, x += r, y += k) {                                              \
                    NAME##_wide line[GROUPS];                                                                           \
                    _Pragma("GCC unroll 8") for (int b = 0; b < GROUPS; b++)                                            \
                        line[b] = *(const NAME##_wide *)(y + b * LANES);                                                \
                    _Pragma("GCC unroll 8") for (int a = 0; a < ROWS; a++)                                              \
                        _Pragma("GCC unroll 8") for (int b = 0; b < GROUPS; b++) sums[a][b] += x[a] * line[b];          \
                }                                                                                                       \
                for (int a = 0; a < ROWS; a++) memcpy(G + (top + a) * k + left, sums[a], sizeof sums[a]);               \
            }                                                                                                           \
        }                                                                                                               \
    }                                                                                                                   \
    __attribute__((target(TARGET))) static void NAME##_rows(const double *X, const double *Y, Py_ssize_t n,             \
                                                            Py_ssize_t r, Py_ssize_t k, int upper, double *G) {         \
        for (Py_ssize_t i = 0; i < r; i += HIGH) {                                                                      \
            Py_ssize_t top = r - i < HIGH ? r - HIGH : i;                                                               \
            for (Py_ssize_t j = upper ? top / WIDE * WIDE : 0; j < k; j += WIDE) {                                      \
                Py_ssize_t left = k - j < WIDE ? k - WIDE : j;                                                          \
                NAME##_wide sums[HIGH][WIDE];                                                                           \
                memset(sums, 0, sizeof sums);                                                                           \
                for (Py_ssize_t column = 0; column < n; column += LANES) {                                              \
                    NAME##_wide line[WIDE];                                                                             \
                    _Pragma("GCC unroll 8") for (int b = 0; b < WIDE; b++)                                              \
                        line[b] = *(const NAME##_wide *)(Y + (left + b) * n + column);                                  \
                    _Pragma("GCC unroll 8") for (int a = 0; a < HIGH; a++) {                                            \
                        NAME##_wide x = *(const NAME##_wide *)(X + (top + a) * n + column);                             \
                        _Pragma("GCC unroll 8") for (int b = 0; b < WIDE; b++) sums[a][b] += x * line[b];               \
                    }                                                                                                   \
                }                                                                                                       \
                for (int a = 0; a < HIGH; a++)                                                                          \
                    for (int b = 0; b < WIDE; b++) {                                                                    \
                        double sum = 0;                                                                                 \
                        for (int lane = 0; lane < LANES; lane++) sum += sums[a][b][lane];                               \
                        G[(top + a) * k + left + b] = sum;                                                              \
                    }                                                                                                   \
            }                                                                                                           \
        }                                                                                                               \
    }

enum { SMALLEST = 8 }; /* rows and columns of any tile below, at most */
#if defined(__x86_64__) && !defined(WITHOUT_AVX512)
DEFINE_GRAM(gram_avx512, "avx512f", 8, 8, 1, 4, 4)
#endif
#if defined(__x86_64__)
DEFINE_GRAM(gram_avx2, "avx2,fma", 4, 4, 2, 4, 2)
#endif

/* Computes G = XᵀY of X (m, r) and Y (m, k), or X Yᵀ of X (r, m) and Y (k, m) if `by_rows`. Returns 0 where BLAS has to
   compute it. */
static int gram(const double *X, const double *Y, Py_ssize_t m, Py_ssize_t r, Py_ssize_t k, int by_rows, double *G) {
    int done = 0, upper = X == Y && r == k;
    if (r < SMALLEST || k < SMALLEST || (by_rows && m % SMALLEST))
        return 0;
#if defined(__x86_64__) && !defined(WITHOUT_AVX512)
    if (__builtin_cpu_supports("avx512f"))
        (by_rows ? gram_avx512_rows : gram_avx512_columns)(X, Y, m, r, k, upper, G), done = 1;
#endif
#if defined(__x86_64__)
    if (!done && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        (by_rows ? gram_avx2_rows : gram_avx2_columns)(X, Y, m, r, k, upper, G), done = 1;
#endif
    for (Py_ssize_t i = 0; done && upper && i < r; i++)
        for (Py_ssize_t j = 0; j < i; j++)
            G[i * r + j] = G[j * r + i];
    return done;
}

INLINE float widened(uint16_t number) {
    uint32_t bits = (uint32_t)number << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

/* Bfloat16 as double. */
FOR_EVERY_PROCESSOR
static void widen_to_doubles(const uint16_t *restrict numbers, Py_ssize_t count, double *restrict wide) {
    for (Py_ssize_t i = 0; i < count; i++)
        wide[i] = widened(numbers[i]);
}

enum { PARTS = 2 }; /* factors side by side, at most */

/* Factors [X₁ X₂] in bfloat16, each (m, widths), or (widths, m) if `by_rows`; a block has `step` of the m rows. */
typedef struct {
    const uint16_t *parts[PARTS];
    Py_ssize_t widths[PARTS], m, step;
    int by_rows;
} Factors;

static void widen_rows(const Factors *f, Py_ssize_t first, Py_ssize_t rows, double *block) {
    Py_ssize_t r = f->widths[0] + f->widths[1], before = 0;
    for (int i = 0; i < PARTS; before += f->widths[i++]) {
        Py_ssize_t width = f->widths[i];
        if (f->by_rows)
            for (Py_ssize_t j = 0; j < width; j++)
                widen_to_doubles(f->parts[i] + j * f->m + first, rows, block + (before + j) * rows);
        else if (width == r)
            widen_to_doubles(f->parts[i] + first * r, rows * r, block);
        else
            for (Py_ssize_t row = 0; row < rows; row++)
                widen_to_doubles(f->parts[i] + (first + row) * width, width, block + row * r + before);
    }
}

/* The Gram matrix G of such factors: those of their blocks are added up, with the sums that `gram` has for each. Returns
   0 where that has to be done block by block, as one of them has fewer than `least` numbers or needs BLAS. */
static int gram_of_factors(const Factors *f, Py_ssize_t least, double *block, double *part, double *G) {
    Py_ssize_t r = f->widths[0] + f->widths[1], last = f->m % f->step;
    if (r < SMALLEST || (last && last * r < least))
        return 0;
    memset(G, 0, r * r * sizeof *G);
    for (Py_ssize_t first = 0; first < f->m; first += f->step) {
        Py_ssize_t rows = f->m - first < f->step ? last : f->step;
        widen_rows(f, first, rows, block);
        if (!gram(block, block, rows, r, r, f->by_rows, part))
            return 0;
        for (Py_ssize_t i = 0; i < r * r; i++)
            G[i] += part[i];
    }
    return 1;
}

/* To the nearest bfloat16, ties to even. NaN keeps its sign and loses its payload, as in ml_dtypes. */
INLINE uint16_t rounded(float number) {
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    uint32_t nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    uint32_t nan = (bits >> 16 & 0x8000) | 0x7FC0;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? nan : nearest);
}

/* One pass over rows of W (rows, n) for two products: Y = W X, unless Y is known, and Z += WᵀY. X and Z come in parts of
   PART columns, one after the other, with n rows and more, a multiple of SPAN. */
typedef struct {
    const void *W; /* bfloat16 if `half`, else float */
    const float *X;
    float *Y, *Z;
    Py_ssize_t rows, n, width; /* PART divides `width` */
    int half, known;
} Pass;

enum { PANEL = 16, SPAN = 32, PART = 16 }; /* rows of W and columns of W that are widened at a time; columns of X */

/* W[row : row + PANEL, column : column + SPAN] as float, with 0 beyond the end of W. */
INLINE void widen_panel(const Pass *p, Py_ssize_t row, Py_ssize_t column, float *panel) {
    int rows = p->rows - row < PANEL ? (int)(p->rows - row) : PANEL;
    int columns = p->n - column < SPAN ? (int)(p->n - column) : SPAN;
    if (rows < PANEL || columns < SPAN)
        memset(panel, 0, PANEL * SPAN * sizeof *panel);
    for (int i = 0; i < rows; i++, panel += SPAN) {
        Py_ssize_t first = (row + i) * p->n + column;
        if (p->half) {
            const uint16_t *w = (const uint16_t *)p->W + first;
            if (columns == SPAN) /* written out, since a known length is quicker */
                for (int j = 0; j < SPAN; j++) panel[j] = widened(w[j]);
            else
                for (int j = 0; j < columns; j++) panel[j] = widened(w[j]);
        } else if (columns == SPAN)
            memcpy(panel, (const float *)p->W + first, SPAN * sizeof *panel);
        else
            memcpy(panel, (const float *)p->W + first, (size_t)columns * sizeof *panel);
    }
}

/* Defines a function that makes a pass in tiles of ROWS × GROUPS vectors of LANES numbers, whose sums stay in registers.
   PANEL rows are widened once for both products, into a cache of the core, so that W itself is read once. */
#define DEFINE_PASS(NAME, TARGET, LANES, ROWS, GROUPS)                                                                  \
    typedef float NAME##_vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));                         \
    typedef uint32_t NAME##_bits __attribute__((vector_size(4 * LANES), aligned(4), may_alias));                        \
    typedef uint16_t NAME##_half __attribute__((vector_size(2 * LANES), aligned(2), may_alias));                        \
    __attribute__((target(TARGET))) static void NAME(const Pass *p, float *panels) {                                    \
        const Py_ssize_t width = p->width, height = (p->n + SPAN - 1) / SPAN * SPAN;                                    \
        for (Py_ssize_t row = 0; row < p->rows; row += PANEL)                                                           \
            for (Py_ssize_t part = 0; part < width; part += PART) {                                                     \
                Py_ssize_t rows = p->rows - row < PANEL ? p->rows - row : PANEL;                                        \
                NAME##_vector y[PANEL][GROUPS], sums[ROWS][GROUPS];                                                     \
                memset(y, 0, sizeof y);                                                                                 \
                for (Py_ssize_t i = 0; p->known && i < rows; i++)                                                       \
                    memcpy(y[i], p->Y + (row + i) * width + part, sizeof y[i]);                                         \
                for (int top = 0; top < (p->known ? 1 : PANEL); top += ROWS) {                                          \
                    float *panel = panels;                                                                              \
                    const float *x = p->X + part * height;                                                              \
                    memset(sums, 0, sizeof sums);                                                                       \
                    for (Py_ssize_t j = 0; j < p->n; j += SPAN, panel += PANEL * SPAN) {                                \
                        /* Written out where the panel is full, as compilers choose shorter vectors by themselves. */    \
                        if (!part && !top && p->half && rows == PANEL && p->n - j >= SPAN)                              \
                            for (int i = 0; i < PANEL; i++) {                                                           \
                                const uint16_t *numbers = (const uint16_t *)p->W + (row + i) * p->n + j;                \
                                _Pragma("GCC unroll 8") for (int k = 0; k < SPAN; k += LANES)                           \
                                    *(NAME##_bits *)(panel + i * SPAN + k) =                                            \
                                        __builtin_convertvector(*(const NAME##_half *)(numbers + k), NAME##_bits) << 16;\
                            }                                                                                           \
                        else if (!part && !top)                                                                         \
                            widen_panel(p, row, j, panel);                                                              \
                        const float *w = panel + top * SPAN;                                                            \
                        for (int k = 0; k < (p->known ? 0 : SPAN); k++, w++, x += PART) {                               \
                            NAME##_vector line[GROUPS];                                                                 \
                            _Pragma("GCC unroll 8") for (int g = 0; g < GROUPS; g++)                                    \
                                line[g] = *(const NAME##_vector *)(x + g * LANES);                                      \
                            _Pragma("GCC unroll 16") for (int i = 0; i < ROWS; i++)                                     \
                                _Pragma("GCC unroll 8") for (int g = 0; g < GROUPS; g++)                                \
                                    sums[i][g] += w[i * SPAN] * line[g];                                                \
                        }                                                                                               \
                    }                                                                                                   \
                    if (!p->known) memcpy(y[top], sums, sizeof sums);                                                   \
                }                                                                                                       \
                for (Py_ssize_t i = 0; !p->known && i < rows; i++)                                                      \
                    memcpy(p->Y + (row + i) * width + part, y[i], sizeof y[i]);                                         \
                float *panel = panels, *z = p->Z + part * height;                                                       \
                for (Py_ssize_t j = 0; j < p->n; j += SPAN, panel += PANEL * SPAN)                                      \
                    for (int k = 0; k < SPAN; k += ROWS, z += ROWS * PART) {                                            \
                        _Pragma("GCC unroll 16") for (int i = 0; i < ROWS; i++)                                         \
                            _Pragma("GCC unroll 8") for (int g = 0; g < GROUPS; g++)                                    \
                                sums[i][g] = *(const NAME##_vector *)(z + i * PART + g * LANES);                        \
                        const float *w = panel + k;                                                                     \
                        for (int r = 0; r < PANEL; r++, w += SPAN)                                                      \
                            _Pragma("GCC unroll 16") for (int i = 0; i < ROWS; i++)                                     \
                                _Pragma("GCC unroll 8") for (int g = 0; g < GROUPS; g++)                                \
                                    sums[i][g] += w[i] * y[r][g];                                                       \
                        _Pragma("GCC unroll 16") for (int i = 0; i < ROWS; i++)                                         \
                            _Pragma("GCC unroll 8") for (int g = 0; g < GROUPS; g++)                                    \
                                *(NAME##_vector *)(z + i * PART + g * LANES) = sums[i][g];                              \
                    }                                                                                                   \
            }                                                                                                           \
    }

#if defined(__x86_64__) && !defined(WITHOUT_AVX512)
DEFINE_PASS(pass_avx512, "avx512f", 16, 16, 1)
#endif
#if defined(__x86_64__)
DEFINE_PASS(pass_avx2, "avx2,fma", 8, 4, 2)
#endif

/* 0 where BLAS is quicker, as in `multiply`. `panels` has room for PANEL rows of X. */
static int multiply_twice(const Pass *p, float *panels) {
#if defined(__x86_64__) && !defined(WITHOUT_AVX512)
    if (__builtin_cpu_supports("avx512f"))
        return pass_avx512(p, panels), 1;
#endif
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return pass_avx2(p, panels), 1;
#endif
    (void)p, (void)panels;
    return 0;
}

/* Y = W R in double, and the sum of the squares of W, for rows W (rows, n). */
typedef struct {
    const void *W; /* bfloat16 if `half`, else float */
    const double *R;
    double *Y;
    Py_ssize_t rows, n, width; /* R has `n` rows, and WIDTHS divides `width` */
    int half;
} Projected;

enum { HIGH = 8, WIDTHS = 24 }; /* rows of W and columns of R that are multiplied at a time */

/* W[row : row + HIGH, column : column + SPAN] as double, with 0 beyond the end of W; adds the squares to SPAN sums. */
INLINE void widen_block(const Projected *p, Py_ssize_t row, Py_ssize_t column, double *block, double *squares) {
    int rows = p->rows - row < HIGH ? (int)(p->rows - row) : HIGH;
    int columns = p->n - column < SPAN ? (int)(p->n - column) : SPAN;
    float line[SPAN] = {0};
    memset(block + rows * SPAN, 0, (size_t)(HIGH - rows) * SPAN * sizeof *block);
    for (int i = 0; i < rows; i++, block += SPAN) {
        Py_ssize_t first = (row + i) * p->n + column;
        const uint16_t *w = (const uint16_t *)p->W + first;
        __builtin_prefetch(w + 2 * SPAN);
        if (!p->half)
            memcpy(line, (const float *)p->W + first, (size_t)columns * sizeof *line);
        else if (columns == SPAN) /* written out, since a known length is quicker */
            for (int j = 0; j < SPAN; j++) line[j] = widened(w[j]);
        else
            for (int j = 0; j < columns; j++) line[j] = widened(w[j]);
        for (int j = 0; j < SPAN; j++) {
            block[j] = line[j];
            squares[j] += block[j] * block[j];
        }
    }
}

/* Defines a function for Y and the sum of the squares of W, in tiles of ROWS × GROUPS vectors of LANES sums. */
#define DEFINE_PROJECT(NAME, TARGET, LANES, ROWS, GROUPS)                                                               \
    typedef double NAME##_vector __attribute__((vector_size(8 * LANES), aligned(8), may_alias));                        \
    __attribute__((target(TARGET))) static double NAME(const Projected *p) {                                            \
        const Py_ssize_t width = p->width;                                                                              \
        double squares[SPAN] = {0}, block[HIGH * SPAN], sum = 0;                                                        \
        memset(p->Y, 0, (size_t)(p->rows * width) * sizeof *p->Y);                                                      \
        for (Py_ssize_t column = 0; column < p->n; column += SPAN)                                                      \
            for (Py_ssize_t row = 0; row < p->rows; row += HIGH) {                                                      \
                int rows = p->rows - row < HIGH ? (int)(p->rows - row) : HIGH;                                          \
                int columns = p->n - column < SPAN ? (int)(p->n - column) : SPAN;                                       \
                widen_block(p, row, column, block, squares);                                                            \
                for (int top = 0; top < rows; top += ROWS)                                                              \
                    for (Py_ssize_t left = 0; left < width; left += LANES * GROUPS) {                                   \
                        NAME##_vector sums[ROWS][GROUPS];                                                               \
                        memset(sums, 0, sizeof sums);                                                                   \
                        const double *r = p->R + column * width + left, *w = block + top * SPAN;                        \
                        for (int k = 0; k < columns; k++, r += width, w++) {                                            \
                            NAME##_vector line[GROUPS];                                                                 \
                            _Pragma("GCC unroll 8") for (int g = 0; g < GROUPS; g++)                                    \
                                line[g] = *(const NAME##_vector *)(r + g * LANES);                                      \
                            _Pragma("GCC unroll 8") for (int i = 0; i < ROWS; i++)                                      \
                                _Pragma("GCC unroll 8") for (int g = 0; g < GROUPS; g++)                                \
                                    sums[i][g] += w[i * SPAN] * line[g];                                                \
                        }                                                                                               \
                        double *y = p->Y + (row + top) * width + left;                                                  \
                        for (int i = 0; i < ROWS && top + i < rows; i++, y += width)                                    \
                            for (int g = 0; g < GROUPS; g++)                                                            \
                                *(NAME##_vector *)(y + g * LANES) += sums[i][g];                                        \
                    }                                                                                                   \
            }                                                                                                           \
        for (int j = 0; j < SPAN; j++) sum += squares[j];                                                               \
        return sum;                                                                                                     \
    }

#if defined(__x86_64__) && !defined(WITHOUT_AVX512)
DEFINE_PROJECT(project_avx512, "avx512f", 8, 8, 3)
#endif
#if defined(__x86_64__)
DEFINE_PROJECT(project_avx2, "avx2,fma", 4, 4, 3)
#endif

/* -1 where BLAS is quicker, as in `multiply`; otherwise the sum of the squares. */
static double project(const Projected *p) {
#if defined(__x86_64__) && !defined(WITHOUT_AVX512)
    if (__builtin_cpu_supports("avx512f"))
        return project_avx512(p);
#endif
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return project_avx2(p);
#endif
    (void)p;
    return -1;
}

FOR_EVERY_PROCESSOR
static void subtract(const uint16_t *merged, const float *D, Py_ssize_t count, uint16_t *R) {
    for (Py_ssize_t i = 0; i < count; i++)
        R[i] = rounded(widened(merged[i]) - D[i]);
}

/* Merges up to CHUNK weights, so that what is computed of them stays in the nearest cache; see `merge`. */
INLINE int merge_chunk(const uint16_t *restrict W, const float *restrict D, int count, float *restrict lost,
                       uint16_t *restrict merged, uint16_t *restrict R) {
    uint16_t equal = 0;
    for (int i = 0; i < count; i++) {
        float total = widened(W[i]) + D[i];
        uint16_t nearest = rounded(total);
        float wide = widened(nearest);
        merged[i] = nearest;
        equal += nearest == W[i];
        if (R)
            R[i] = rounded(wide - D[i]);
        if (lost)
            lost[i] = wide - total;
    }
    return equal;
}

/* Computes merged = round(W + D), and merged - (W + D) if `lost` is not NULL. Then it lists the places where W differs
   from R = round(merged - D), and R there, for at most `most` places; `found` becomes the number of all such places.
   Returns the number of entries that the merge has not changed. */
FOR_EVERY_PROCESSOR
static Py_ssize_t merge(const uint16_t *W, const float *D, Py_ssize_t count, float *lost, uint16_t *merged,
                        int64_t *places, uint16_t *there, Py_ssize_t most, Py_ssize_t *found) {
    Py_ssize_t equal = 0;
    *found = 0;
    for (Py_ssize_t start = 0; start < count; start += CHUNK) {
        uint16_t R[CHUNK];
        const uint16_t *w = W + start;
        int size = count - start < CHUNK ? (int)(count - start) : CHUNK;
        /* Written out, as the loop is quicker where its length and what it writes are known. */
        if (size < CHUNK)
            equal += merge_chunk(w, D + start, size, lost ? lost + start : NULL, merged + start, R);
        else if (lost && most)
            equal += merge_chunk(w, D + start, CHUNK, lost + start, merged + start, R);
        else if (lost)
            equal += merge_chunk(w, D + start, CHUNK, lost + start, merged + start, NULL);
        else if (most)
            equal += merge_chunk(w, D + start, CHUNK, NULL, merged + start, R);
        else
            equal += merge_chunk(w, D + start, CHUNK, NULL, merged + start, NULL);
        for (int i = 0; most && i < size; i++) {
            /* Few differ, so four are compared at a time. */
            if (i + 4 <= size && !memcmp(w + i, R + i, 8)) {
                i += 3;
                continue;
            }
            if (w[i] != R[i]) {
                if (*found < most)
                    places[*found] = start + i, there[*found] = R[i];
                ++*found;
            }
        }
    }
    return equal;
}

/* D at the places of a sample, and what is lost of it if W + D is rounded to the nearest bfloat16. Both are 0 where the
   loss is not finite; other entries of which nothing arrives are counted in `still`.
   Returns the number of finite entries, or -1 if the sample leaves the arrays. */
static Py_ssize_t predict(const uint16_t *W, const float *D, Py_ssize_t count, const int64_t *sample, Py_ssize_t size,
                          double *d, double *lost, Py_ssize_t *still) {
    Py_ssize_t finite = 0;
    *still = 0;
    for (Py_ssize_t i = 0; i < size; i++) {
        int64_t place = sample[i];
        if (place < 0 || place >= count)
            return -1;
        float wide = widened(W[place]), total = wide + D[place];
        double arrives = (double)widened(rounded(total)) - wide, loss = D[place] - arrives;
        int known = loss - loss == 0;
        d[i] = known ? D[place] : 0;
        lost[i] = known ? loss : 0;
        *still += known && arrives == 0;
        finite += known;
    }
    return finite;
}

/* The ranks of a row by absolute value come from a stable radix sort: two passes sort by the lower digits of the bits
 * without the sign, and the third one counts up to the rank of every entry, so that nothing is moved in it. */
#define DIGIT 11
#define DIGITS (1 << DIGIT)
typedef struct { uint32_t size, place; } Sized;

/* A row of DELLA: the entry of rank i is multiplied by factors[i] and is kept if its word times this is below `end`. */
static void prune(float *row, const uint16_t *words, const float *factors, Py_ssize_t n, float end, uint8_t *kept,
                  Sized *first, Sized *second) {
    static const int shifts[3] = {0, DIGIT, 2 * DIGIT};
    uint32_t starts[3][DIGITS] = {{0}};
    for (Py_ssize_t i = 0; i < n; i++) {
        uint32_t size;
        memcpy(&size, row + i, sizeof size);
        size &= 0x7FFFFFFF;
        first[i] = (Sized){size, (uint32_t)i};
        for (int digit = 0; digit < 3; digit++)
            starts[digit][size >> shifts[digit] & (DIGITS - 1)]++;
    }
    for (int digit = 0; digit < 3; digit++)
        for (uint32_t i = 0, sum = 0; i < DIGITS; i++) {
            uint32_t count = starts[digit][i];
            starts[digit][i] = sum, sum += count;
        }
    for (Py_ssize_t i = 0; i < n; i++)
        second[starts[0][first[i].size & (DIGITS - 1)]++] = first[i];
    for (Py_ssize_t i = 0; i < n; i++)
        first[starts[1][second[i].size >> DIGIT & (DIGITS - 1)]++] = second[i];
    for (Py_ssize_t i = 0; i < n; i++) {
        uint32_t place = first[i].place;
        float factor = factors[starts[2][first[i].size >> 2 * DIGIT]++], draw = (float)words[place] * factor;
        kept[place] = (draw < end) & (row[place] != 0); /* without a branch, which would be guessed wrong */
        row[place] *= factor;
    }
}

/* A chunk of `elect`. Entries that are kept have a mask each, or a least size in place of both masks. */
INLINE void elect_some(const float *restrict a, const float *restrict b, const uint8_t *restrict kept_a,
                       const uint8_t *restrict kept_b, float least_a, float least_b, Py_ssize_t count,
                       float *restrict out) {
    for (Py_ssize_t i = 0; i < count; i++) {
        float x = a[i], y = b[i], size_x = x < 0 ? -x : x, size_y = y < 0 ? -y : y;
        int32_t stays_x = kept_a ? kept_a[i] : (size_x >= least_a) & (size_x > 0);
        int32_t stays_y = kept_b ? kept_b[i] : (size_y >= least_b) & (size_y > 0);
        int32_t both = stays_x & stays_y, clash = both & ((x > 0) ^ (y > 0));
        both ^= clash;
        stays_x ^= clash & (size_x <= size_y);
        stays_y ^= clash & (size_y <= size_x);
        /* Twice the weight of each is 0, 1 or 2, so both products are exact. */
        out[i] = 0.5f * ((float)(2 * stays_x - both) * x + (float)(2 * stays_y - both) * y);
    }
}

/* The mean of two entries that are kept; of two with opposite signs only the larger one counts, and neither if they are
   equal and opposite. */
FOR_EVERY_PROCESSOR
static void elect(const float *a, const float *b, const uint8_t *kept_a, const uint8_t *kept_b, float least_a,
                  float least_b, Py_ssize_t count, float *out) {
    if (kept_a && kept_b)
        elect_some(a, b, kept_a, kept_b, 0, 0, count, out);
    else
        elect_some(a, b, NULL, NULL, least_a, least_b, count, out);
}

/* Float16 as the bits of a float, exactly. -0 becomes 0, and all NaN become the one of NumPy. Numbers below the smallest
   normal one come from integers, since a processor may be set to take such a float for 0. */
INLINE uint32_t widened_half(uint32_t half) {
    uint32_t size = half & 0x7FFF, bits;
    float below = (float)(int32_t)size * 0x1p-24f;
    memcpy(&bits, &below, sizeof bits);
    /* With masks, as a condition would keep the compiler from computing several numbers at a time. */
    uint32_t is_below = -(uint32_t)(size < 0x400), ends = -(uint32_t)(size >= 0x7C00);
    bits = (bits & is_below) | (((size << 13) + (112u << 23)) & ~is_below);
    bits = (bits & ~ends) | (0x7F800000 & ends) | ((half & 0x8000) << 16 & -(uint32_t)(size > 0));
    ends = -(uint32_t)(size > 0x7C00);
    return (bits & ~ends) | (0x7FC00000 & ends);
}

FOR_EVERY_PROCESSOR
static void widen_halves(const uint16_t *restrict halves, Py_ssize_t count, uint32_t *restrict wide) {
    for (Py_ssize_t i = 0; i < count; i++)
        wide[i] = widened_half(halves[i]);
}

enum { BFLOAT16, FLOAT16, FLOAT32 };            /* kinds of numbers, as in `loops` */
enum { TURNED = 32, MOST_RANKS = 16, EIGHT = 8 }; /* rows that are turned at a time, their columns, and sums side by side */

/* Factors of one shape and kind, one for each module: (size, rank) if `turned`, else (rank, size). */
typedef struct {
    const Py_buffer *factors;
    const double *scales;
    Py_ssize_t modules, rank, size;
    int kind, turned;
} Stack;

/* Some numbers of a factor as float. */
INLINE void widen_numbers(const void *numbers, int kind, Py_ssize_t first, Py_ssize_t count, float *restrict wide) {
    const uint16_t *halves = (const uint16_t *)numbers + first;
    if (kind == FLOAT32)
        memcpy(wide, (const float *)numbers + first, (size_t)count * sizeof *wide);
    for (Py_ssize_t i = 0; kind == BFLOAT16 && i < count; i++)
        wide[i] = widened(halves[i]);
    for (Py_ssize_t i = 0; kind == FLOAT16 && i < count; i++) {
        uint32_t bits = widened_half(halves[i]);
        memcpy(wide + i, &bits, sizeof bits);
    }
}

/* The largest absolute value, or NaN if there is one. */
INLINE double peak_of(const double *row, Py_ssize_t size) {
    uint64_t largest = 0;
    double peak;
    /* Of numbers without a sign the bits have the same order, and those of NaN come last. */
    for (Py_ssize_t i = 0; i < size; i++) {
        uint64_t bits;
        memcpy(&bits, row + i, sizeof bits);
        bits &= INT64_MAX;
        largest = bits > largest ? bits : largest;
    }
    memcpy(&peak, &largest, sizeof peak);
    return peak;
}

/* The inner products of all rows, also where `gram` leaves them to BLAS. */
INLINE void gram_of_rows(const double *rows, Py_ssize_t rank, Py_ssize_t size, double *G) {
    for (Py_ssize_t i = 0; i < rank; i++)
        for (Py_ssize_t j = 0; j <= i; j++) {
            const double *x = rows + i * size, *y = rows + j * size;
            double sums[EIGHT] = {0}, sum = 0;
            Py_ssize_t k = 0;
            for (; k + EIGHT <= size; k += EIGHT)
                for (int lane = 0; lane < EIGHT; lane++)
                    sums[lane] += x[k + lane] * y[k + lane];
            for (; k < size; k++)
                sum += x[k] * y[k];
            for (int lane = 0; lane < EIGHT; lane++)
                sum += sums[lane];
            G[i * rank + j] = G[j * rank + i] = sum;
        }
}

/* The rows of all factors times their scale, their Gram matrices and the largest absolute value of each row. */
FOR_EVERY_PROCESSOR
static void stack_factors(const Stack *s, double *rows, double *grams, double *peaks) {
    float block[TURNED * MOST_RANKS];
    Py_ssize_t rank = s->rank, size = s->size;
    for (Py_ssize_t module = 0; module < s->modules; module++, rows += rank * size, grams += rank * rank) {
        double scale = s->scales[module];
        if (s->turned)
            for (Py_ssize_t first = 0; first < size; first += TURNED) {
                Py_ssize_t some = size - first < TURNED ? size - first : TURNED;
                widen_numbers(s->factors[module].buf, s->kind, first * rank, some * rank, block);
                for (Py_ssize_t k = 0; k < rank; k++)
                    for (Py_ssize_t i = 0; i < some; i++)
                        rows[k * size + first + i] = (double)block[i * rank + k] * scale;
            }
        else
            for (Py_ssize_t first = 0; first < rank * size; first += TURNED * MOST_RANKS) {
                Py_ssize_t left = rank * size - first, some = left < TURNED * MOST_RANKS ? left : TURNED * MOST_RANKS;
                widen_numbers(s->factors[module].buf, s->kind, first, some, block);
                for (Py_ssize_t i = 0; i < some; i++)
                    rows[first + i] = (double)block[i] * scale;
            }
        for (Py_ssize_t k = 0; k < rank; k++)
            *peaks++ = peak_of(rows + k * size, size);
        if (!gram(rows, rows, size, rank, rank, 1, grams))
            gram_of_rows(rows, rank, size, grams);
    }
}

enum { BUCKETS = 4096, LANES = 8 }; /* of a count-sketch, and the columns that are transformed side by side */

typedef struct {
    double re[LANES], im[LANES];
} Lanes;

/* One side of modules, as in `loops.SketchSide`, with the numbers of its rows in C order. */
typedef struct {
    const double *numbers, *factors, *signs;
    const int64_t *positions;
    Py_ssize_t size;
} Side;

enum { TILE = 64 }; /* numbers of each row that are rounded before they are added to their buckets */

/* Adds the rounded numbers of `count` rows of one module, from `row` on, to their buckets in as many lanes, from `lane`
   on. A bucket of all lanes is one line of the cache; `part` is 0 for its real and 1 for its imaginary numbers. */
INLINE void scatter(const Side *side, Py_ssize_t row, Py_ssize_t module, int lane, int count, Lanes *z, int part) {
    const double magic = 0x1.8p52, *signs = side->signs + module * side->size;
    const int64_t *positions = side->positions + module * side->size;
    double tile[TILE][LANES];
    memset(tile, 0, sizeof tile);
    for (Py_ssize_t first = 0; first < side->size; first += TILE) {
        int some = side->size - first < TILE ? (int)(side->size - first) : TILE;
        for (int k = 0; k < count; k++) {
            const double *numbers = side->numbers + (row + k) * side->size + first, factor = side->factors[row + k];
            for (int i = 0; i < some; i++)
                /* The sum with 1.5 * 2^52 rounds to an integer, ties to even. */
                tile[i][lane + k] = (numbers[i] * factor + magic - magic) * signs[first + i];
        }
        for (int i = 0; i < some; i++) {
            Lanes *bucket = z + (positions[first + i] & (BUCKETS - 1));
            double *sums = part ? bucket->im : bucket->re;
            for (int l = 0; l < LANES; l++)
                sums[l] += tile[i][l];
        }
    }
}

/* Sums and differences of the complex numbers in registers X and Y. */
#define BUTTERFLY(X, Y)                                                                                                 \
    {                                                                                                                   \
        double re = X##_re - Y##_re, im = X##_im - Y##_im;                                                              \
        X##_re += Y##_re, X##_im += Y##_im, Y##_re = re, Y##_im = im;                                                   \
    }

/* Multiplies X by -i. */
#define TURN(X)                                                                                                         \
    {                                                                                                                   \
        double re = X##_re;                                                                                             \
        X##_re = X##_im, X##_im = -re;                                                                                  \
    }

#define LOAD(X, K) double X##_re = a[K * eighth].re[i], X##_im = a[K * eighth].im[i];
#define STORE(X, K)                                                                                                     \
    a[K * eighth].re[i] = re[K] * X##_re - im[K] * X##_im, a[K * eighth].im[i] = re[K] * X##_im + im[K] * X##_re;

/* The transform of eight numbers of lane i, whose results are p, t, r, v, q, u, s and w. */
#define TRANSFORM_EIGHT                                                                                                 \
    LOAD(p, 0) LOAD(q, 1) LOAD(r, 2) LOAD(s, 3) LOAD(t, 4) LOAD(u, 5) LOAD(v, 6) LOAD(w, 7)                             \
    BUTTERFLY(p, t) BUTTERFLY(q, u) BUTTERFLY(r, v) BUTTERFLY(s, w)                                                     \
    /* Differences are turned by an eighth, a quarter and three eighths. */                                             \
    double u_old = u_re, w_old = w_re;                                                                                  \
    u_re = ROOT_HALF * (u_re + u_im), u_im = ROOT_HALF * (u_im - u_old);                                                \
    TURN(v)                                                                                                             \
    w_re = ROOT_HALF * (w_im - w_re), w_im = -ROOT_HALF * (w_old + w_im);                                               \
    BUTTERFLY(p, r) BUTTERFLY(q, s) BUTTERFLY(t, v) BUTTERFLY(u, w)                                                     \
    TURN(s) TURN(w)                                                                                                     \
    BUTTERFLY(p, q) BUTTERFLY(r, s) BUTTERFLY(t, u) BUTTERFLY(v, w)

static const double ROOT_HALF = 0.70710678118654752440;

/* The first step of a transform of `length` numbers by decimation in frequency: its eighths are then transformed. */
INLINE void split(Lanes *z, const double *turns, int length) {
    const int eighth = length / 8, step = 2 * BUCKETS / length;
    for (int j = 0; j < eighth; j++) {
        Lanes *a = z + j;
        double re[8], im[8];
        for (int k = 1; k < 8; k++)
            re[k] = turns[step * j * k], im[k] = turns[step * j * k + 1];
        _Pragma("GCC ivdep") for (int i = 0; i < LANES; i++) {
            TRANSFORM_EIGHT
            a->re[i] = p_re, a->im[i] = p_im;
            STORE(t, 1) STORE(r, 2) STORE(v, 3) STORE(q, 4) STORE(u, 5) STORE(s, 6) STORE(w, 7)
        }
    }
}

#define SQUARE(X, K)                                                                                                    \
    squares[2 * K][i] = X##_re * X##_re - X##_im * X##_im, squares[2 * K + 1][i] = 2 * X##_re * X##_im;

/* The last step, for eight numbers of each lane: the squares of the results are added up over the lanes. */
INLINE void square(const Lanes *a, double *total) {
    enum { eighth = 1 };
    double squares[16][LANES];
    _Pragma("GCC ivdep") for (int i = 0; i < LANES; i++) {
        TRANSFORM_EIGHT
        SQUARE(p, 0) SQUARE(t, 1) SQUARE(r, 2) SQUARE(v, 3) SQUARE(q, 4) SQUARE(u, 5) SQUARE(s, 6) SQUARE(w, 7)
    }
    for (int k = 0; k < 16; k++) {
        double sum = 0;
        for (int i = 0; i < LANES; i++)
            sum += squares[k][i];
        total[k] += sum;
    }
}

/* The sum of the squares of the transforms of all columns, in the order in which `split` leaves them: the digits of a
   place to the base 8 are reversed. Its last bits are not those of NumPy. What follows from it is rounded to integers,
   and the numbers are so small that both give the same ones (loralens/fleet/sketching/tensor_sketch.py). */
FOR_EVERY_PROCESSOR
static void convolve(const Side *B, const Side *A, Py_ssize_t rows, Py_ssize_t rank, const double *turns, Lanes *z,
                     double *total) {
    memset(z, 0, BUCKETS * sizeof *z);
    memset(total, 0, 2 * BUCKETS * sizeof *total);
    for (Py_ssize_t first = 0; first < rows; first += LANES) {
        for (Py_ssize_t row = first, next; row < rows && row < first + LANES; row = next) {
            Py_ssize_t module = row / rank;
            next = (module + 1) * rank < first + LANES ? (module + 1) * rank : first + LANES;
            scatter(B, row, module, (int)(row - first), (int)(next - row), z, 0);
            scatter(A, row, module, (int)(row - first), (int)(next - row), z, 1);
        }
        /* An eighth is transformed as a whole, since it then stays in a nearer cache. */
        for (int start = 0; start < BUCKETS; start += 8) {
            for (int length = BUCKETS; length > 8; length /= 8)
                if (start % length == 0)
                    split(z + start, turns, length);
            square(z + start, total + 2 * start);
            memset(z + start, 0, 8 * sizeof *z);
        }
    }
}

/* The functions of the module check the sizes of all buffers, so that none of the loops leaves one. */

static PyObject *refused(void) {
    PyErr_SetString(PyExc_ValueError, "the sizes of the arrays do not fit");
    return NULL;
}

/* Whether a buffer has rows × columns numbers of so many bytes; a product that is no Py_ssize_t fits nothing. */
static int has(const Py_buffer *buffer, Py_ssize_t rows, Py_ssize_t columns, Py_ssize_t bytes) {
    Py_ssize_t size;
    return rows >= 0 && columns >= 0 && !__builtin_mul_overflow(rows, columns, &size) &&
           !__builtin_mul_overflow(size, bytes, &size) && buffer->len == size;
}

static void release(Py_buffer *buffers, int count) {
    for (int i = 0; i < count; i++)
        PyBuffer_Release(&buffers[i]);
}

static PyObject *py_multiply(PyObject *self, PyObject *args) {
    Py_buffer b[5];
    Product p;
    int is_map;
    if (!PyArg_ParseTuple(args, "y*y*ny*y*nnnpw*", &b[0], &b[1], &p.rank, &b[2], &b[3], &p.rank2, &p.rows, &p.columns,
                          &is_map, &b[4]))
        return NULL;
    p.B = b[0].buf, p.A = b[1].buf, p.B2 = b[2].buf, p.A2 = b[3].buf, p.D = b[4].buf;
    PyObject *result = NULL;
    Py_ssize_t wide = sizeof(double), size = is_map ? sizeof(double) : sizeof(float);
    void *memory = NULL;
    if (!has(&b[0], p.rows, p.rank, wide) || !has(&b[1], p.rank, p.columns, wide) || !has(&b[2], p.rows, p.rank2, wide) ||
        !has(&b[3], p.rank2, p.columns, wide) || !has(&b[4], p.rows, p.columns, size))
        refused();
    else if (!(memory = malloc((size_t)(p.rank + p.rank2) * WIDEST * sizeof(double) + LINE)))
        PyErr_NoMemory();
    else {
        int done;
        Py_BEGIN_ALLOW_THREADS
        done = multiply(&p, is_map, (double *)(((uintptr_t)memory + LINE - 1) / LINE * LINE));
        Py_END_ALLOW_THREADS
        result = PyBool_FromLong(done);
    }
    free(memory);
    release(b, 5);
    return result;
}

static PyObject *py_gram(PyObject *self, PyObject *args) {
    Py_buffer b[3];
    Py_ssize_t m, r, k, wide = sizeof(double);
    int by_rows, done = 0;
    if (!PyArg_ParseTuple(args, "y*y*nnnpw*", &b[0], &b[1], &m, &r, &k, &by_rows, &b[2]))
        return NULL;
    int fits = has(&b[0], m, r, wide) && has(&b[1], m, k, wide) && has(&b[2], r, k, wide);
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        done = gram(b[0].buf, b[1].buf, m, r, k, by_rows, b[2].buf);
        Py_END_ALLOW_THREADS
    }
    PyObject *result = fits ? PyBool_FromLong(done) : refused();
    release(b, 3);
    return result;
}

static PyObject *py_gram_of_factors(PyObject *self, PyObject *args) {
    Py_buffer b[5];
    Py_ssize_t least, wide = sizeof(double);
    Factors f;
    int done = 0;
    if (!PyArg_ParseTuple(args, "y*ny*nnpnnw*w*w*", &b[0], &f.widths[0], &b[1], &f.widths[1], &f.m, &f.by_rows, &f.step,
                          &least, &b[2], &b[3], &b[4]))
        return NULL;
    int fits = f.widths[0] > 0 && f.step > 0;
    for (int i = 0; i < PARTS; i++) {
        f.parts[i] = b[i].buf;
        fits = fits && f.widths[i] <= INT32_MAX && has(&b[i], f.m, f.widths[i], 2);
    }
    Py_ssize_t r = fits ? f.widths[0] + f.widths[1] : 0;
    fits = fits && has(&b[3], r, r, wide) && b[4].len == b[3].len && b[2].len >= (f.m < f.step ? f.m : f.step) * r * wide;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        done = gram_of_factors(&f, least, b[2].buf, b[3].buf, b[4].buf);
        Py_END_ALLOW_THREADS
    }
    PyObject *result = fits ? PyBool_FromLong(done) : refused();
    release(b, 5);
    return result;
}

static PyObject *py_multiply_twice(PyObject *self, PyObject *args) {
    Py_buffer b[4];
    Pass p;
    if (!PyArg_ParseTuple(args, "y*pnny*npw*w*", &b[0], &p.half, &p.rows, &p.n, &b[1], &p.width, &p.known, &b[2], &b[3]))
        return NULL;
    p.W = b[0].buf, p.X = b[1].buf, p.Y = b[2].buf, p.Z = b[3].buf;
    Py_ssize_t wide = sizeof(float), padded = p.n < PY_SSIZE_T_MAX - SPAN ? (p.n + SPAN - 1) / SPAN * SPAN : -1;
    PyObject *result = NULL;
    void *memory = NULL;
    if (p.width <= 0 || p.width % PART || !has(&b[0], p.rows, p.n, p.half ? 2 : wide) ||
        !has(&b[2], p.rows, p.width, wide) || !has(&b[3], padded, p.width, wide) ||
        b[1].len != (p.known ? 0 : b[3].len))
        refused();
    else if (!(memory = malloc((size_t)(PANEL * padded * wide) + LINE)))
        PyErr_NoMemory();
    else {
        int done;
        Py_BEGIN_ALLOW_THREADS
        done = multiply_twice(&p, (float *)(((uintptr_t)memory + LINE - 1) / LINE * LINE));
        Py_END_ALLOW_THREADS
        result = PyBool_FromLong(done);
    }
    free(memory);
    release(b, 4);
    return result;
}

static PyObject *py_project(PyObject *self, PyObject *args) {
    Py_buffer b[3];
    Projected p;
    if (!PyArg_ParseTuple(args, "y*pnny*nw*", &b[0], &p.half, &p.rows, &p.n, &b[1], &p.width, &b[2]))
        return NULL;
    p.W = b[0].buf, p.R = b[1].buf, p.Y = b[2].buf;
    Py_ssize_t wide = sizeof(double);
    int fits = p.width % WIDTHS == 0 && has(&b[0], p.rows, p.n, p.half ? 2 : 4) && has(&b[1], p.n, p.width, wide) &&
               has(&b[2], p.rows, p.width, wide);
    double squares = 0;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS
        squares = project(&p);
        Py_END_ALLOW_THREADS
    }
    PyObject *result = fits ? PyFloat_FromDouble(squares) : refused();
    release(b, 3);
    return result;
}

static PyObject *py_subtract(PyObject *self, PyObject *args) {
    Py_buffer b[3];
    if (!PyArg_ParseTuple(args, "y*y*w*", &b[0], &b[1], &b[2]))
        return NULL;
    Py_ssize_t count = b[0].len / 2;
    PyObject *result = NULL;
    if (b[1].len != 4 * count || b[2].len != 2 * count)
        refused();
    else {
        Py_BEGIN_ALLOW_THREADS
        subtract(b[0].buf, b[1].buf, count, b[2].buf);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    release(b, 3);
    return result;
}

static PyObject *py_merge(PyObject *self, PyObject *args) {
    Py_buffer b[6];
    if (!PyArg_ParseTuple(args, "y*y*w*w*w*w*", &b[0], &b[1], &b[2], &b[3], &b[4], &b[5]))
        return NULL;
    Py_ssize_t count = b[0].len / 2, most = b[5].len / 2, equal = 0, found = 0;
    PyObject *result = NULL;
    if (b[1].len != 4 * count || (b[2].len && b[2].len != 4 * count) || b[3].len != 2 * count || b[4].len != 8 * most)
        refused();
    else {
        float *lost = b[2].len ? b[2].buf : NULL;
        Py_BEGIN_ALLOW_THREADS
        equal = merge(b[0].buf, b[1].buf, count, lost, b[3].buf, b[4].buf, b[5].buf, most, &found);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("nn", equal, found);
    }
    release(b, 6);
    return result;
}

static PyObject *py_predict(PyObject *self, PyObject *args) {
    Py_buffer b[5];
    if (!PyArg_ParseTuple(args, "y*y*y*w*w*", &b[0], &b[1], &b[2], &b[3], &b[4]))
        return NULL;
    Py_ssize_t count = b[0].len / 2, size = b[2].len / 8, finite = -1, still = 0;
    PyObject *result = NULL;
    if (b[1].len == 4 * count && b[3].len == 8 * size && b[4].len == 8 * size) {
        Py_BEGIN_ALLOW_THREADS
        finite = predict(b[0].buf, b[1].buf, count, b[2].buf, size, b[3].buf, b[4].buf, &still);
        Py_END_ALLOW_THREADS
    }
    if (finite < 0)
        refused();
    else
        result = Py_BuildValue("nn", finite, still);
    release(b, 5);
    return result;
}

static PyObject *py_prune(PyObject *self, PyObject *args) {
    Py_buffer b[4];
    float end;
    if (!PyArg_ParseTuple(args, "w*y*y*fw*", &b[0], &b[1], &b[2], &end, &b[3]))
        return NULL;
    Py_ssize_t n = b[2].len / (Py_ssize_t)sizeof(float), rows = n ? b[3].len / n : 0;
    PyObject *result = NULL;
    Sized *memory = NULL;
    if (!n || n > INT32_MAX || b[3].len != rows * n || b[0].len != rows * n * (Py_ssize_t)sizeof(float) ||
        b[1].len != rows * n * 2)
        refused();
    else if (!(memory = malloc(2 * (size_t)n * sizeof(Sized))))
        PyErr_NoMemory();
    else {
        Py_BEGIN_ALLOW_THREADS
        for (Py_ssize_t i = 0; i < rows; i++)
            prune((float *)b[0].buf + i * n, (const uint16_t *)b[1].buf + i * n, b[2].buf, n, end,
                  (uint8_t *)b[3].buf + i * n, memory, memory + n);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    free(memory);
    release(b, 4);
    return result;
}

static PyObject *py_elect(PyObject *self, PyObject *args) {
    Py_buffer b[5];
    float least[2];
    if (!PyArg_ParseTuple(args, "y*y*y*y*ffw*", &b[0], &b[1], &b[2], &b[3], &least[0], &least[1], &b[4]))
        return NULL;
    Py_ssize_t count = b[0].len / (Py_ssize_t)sizeof(float), masks = b[2].len;
    PyObject *result = NULL;
    if (b[1].len != b[0].len || b[4].len != b[0].len || b[3].len != masks || (masks && masks != count))
        refused();
    else {
        const uint8_t *kept_a = masks ? b[2].buf : NULL, *kept_b = masks ? b[3].buf : NULL;
        Py_BEGIN_ALLOW_THREADS
        elect(b[0].buf, b[1].buf, kept_a, kept_b, least[0], least[1], count, b[4].buf);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    release(b, 5);
    return result;
}

static PyObject *py_widen(PyObject *self, PyObject *args) {
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "y*w*", &b[0], &b[1]))
        return NULL;
    Py_ssize_t count = b[0].len / 2;
    PyObject *result = NULL;
    if (b[0].len != 2 * count || b[1].len != 4 * count)
        refused();
    else {
        Py_BEGIN_ALLOW_THREADS
        widen_halves(b[0].buf, count, b[1].buf);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    release(b, 2);
    return result;
}

static PyObject *py_stack_factors(PyObject *self, PyObject *args) {
    Py_buffer b[4], *factors = NULL;
    PyObject *list;
    Stack s;
    if (!PyArg_ParseTuple(args, "Oinnpy*w*w*w*", &list, &s.kind, &s.rank, &s.size, &s.turned, &b[0], &b[1], &b[2], &b[3]))
        return NULL;
    Py_ssize_t wide = sizeof(double), taken = 0, bytes = s.kind == FLOAT32 ? 4 : 2;
    s.modules = PyList_Check(list) ? PyList_Size(list) : -1, s.scales = b[0].buf;
    int fits = s.modules > 0 && s.kind >= BFLOAT16 && s.kind <= FLOAT32 && s.rank > 0 && s.rank <= MOST_RANKS &&
               s.size > 0 && has(&b[0], s.modules, 1, wide) && has(&b[1], s.modules * s.rank, s.size, wide) &&
               has(&b[2], s.modules, s.rank * s.rank, wide) && has(&b[3], s.modules, s.rank, wide);
    if (fits && (factors = malloc((size_t)s.modules * sizeof *factors))) {
        s.factors = factors;
        while (fits && taken < s.modules && !PyObject_GetBuffer(PyList_GetItem(list, taken), &factors[taken], PyBUF_SIMPLE))
            fits = factors[taken++].len == s.rank * s.size * bytes;
        if (fits && taken == s.modules) {
            Py_BEGIN_ALLOW_THREADS
            stack_factors(&s, b[1].buf, b[2].buf, b[3].buf);
            Py_END_ALLOW_THREADS
        }
    } else if (fits)
        PyErr_NoMemory();
    PyObject *result = PyErr_Occurred() ? NULL : fits ? Py_NewRef(Py_None) : refused();
    release(factors, (int)taken);
    free(factors);
    release(b, 4);
    return result;
}

static PyObject *py_convolve(PyObject *self, PyObject *args) {
    Py_buffer b[10];
    Py_ssize_t rank, wide = sizeof(double);
    if (!PyArg_ParseTuple(args, "y*y*y*y*y*y*y*y*ny*w*", &b[0], &b[1], &b[2], &b[3], &b[4], &b[5], &b[6], &b[7], &rank,
                          &b[8], &b[9]))
        return NULL;
    Py_ssize_t rows = b[1].len / wide, modules = rank > 0 ? rows / rank : 0;
    Side sides[2];
    int fit = modules && rows == modules * rank && b[8].len == 2 * BUCKETS * wide && b[9].len == b[8].len;
    for (int i = 0; i < 2; i++) {
        const Py_buffer *side = b + 4 * i;
        Py_ssize_t size = modules ? side[2].len / wide / modules : 0;
        sides[i] = (Side){side[0].buf, side[1].buf, side[3].buf, side[2].buf, size};
        fit = fit && side[0].len == rows * size * wide && side[1].len == rows * wide &&
              side[2].len == modules * size * wide && side[3].len == side[2].len;
    }
    PyObject *result = NULL;
    void *memory = NULL;
    if (!fit)
        refused();
    else if (!(memory = malloc(BUCKETS * sizeof(Lanes) + LINE)))
        PyErr_NoMemory();
    else {
        Lanes *z = (Lanes *)(((uintptr_t)memory + LINE - 1) / LINE * LINE);
        Py_BEGIN_ALLOW_THREADS
        convolve(&sides[0], &sides[1], rows, rank, b[8].buf, z, b[9].buf);
        Py_END_ALLOW_THREADS
        result = Py_NewRef(Py_None);
    }
    free(memory);
    release(b, 10);
    return result;
}

static PyMethodDef methods[] = {
    {"multiply", py_multiply, METH_VARARGS, "D = B A + B2 A2 in float or double, from sums in double; False if it was not computed."},
    {"gram", py_gram, METH_VARARGS, "The inner products of the columns or rows of two factors; False if it was not computed."},
    {"gram_of_factors", py_gram_of_factors, METH_VARARGS, "The Gram matrix of one or two factors in bfloat16; False if it was not computed."},
    {"multiply_twice", py_multiply_twice, METH_VARARGS, "Y = W X, unless it is known, and Z += WᵀY; False if it was not computed."},
    {"project", py_project, METH_VARARGS, "Y = W R and the sum of the squares of W, which is -1 if nothing was computed."},
    {"subtract", py_subtract, METH_VARARGS, "merged - D, rounded to bfloat16."},
    {"merge", py_merge, METH_VARARGS, "W + D, rounded to bfloat16, what is lost, and where the rounding is not undone."},
    {"predict", py_predict, METH_VARARGS, "What is lost of D at some places; the finite ones, and those that stay."},
    {"prune", py_prune, METH_VARARGS, "Which entries of rows DELLA keeps, after all are multiplied by the factor of their rank."},
    {"elect", py_elect, METH_VARARGS, "The mean of two updates whose entries have the elected sign."},
    {"widen", py_widen, METH_VARARGS, "Float16 as float, without -0 and with one NaN."},
    {"stack_factors", py_stack_factors, METH_VARARGS, "Rows of factors as double, their Gram matrices and largest absolute values."},
    {"convolve", py_convolve, METH_VARARGS, "The sum of the squared transforms of the count-sketches of columns."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernel", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModule_Create(&module); }
