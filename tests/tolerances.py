"""Every tolerance of the tests, and what it is a tolerance of. ε = 2.2e-16."""

# Of each singular value, relative to itself, where only the lengths of columns and rows are spread (measured: 2e-15).
RELATIVE = 1e-12

# Of each singular value, relative to ‖B‖₂‖A‖₂, where the Gram matrix alone must not be trusted (measured: 2e-15).
BACKWARD = 1e-14

# The same on any factors; the Gram route may add 1.5e-16 κ for either factor, κ ≤ 100.
ANY_FACTORS = 5e-14

# Of U diag(s) Vh - B A, relative to ‖B‖₂‖A‖₂; small matrices (measured: 7e-15).
RECONSTRUCTION = 2e-14

# Of an entry of UᵀU - 1 (measured: 4e-15).
ORTHONORMAL = 1e-14

# Of a norm or a rank measure of at most a few dozen singular values, relative.
MEASURE = 1e-13

# Of ΔW as read, entry by entry, beside what PEFT's merge adds: float64 on both sides, W of size 1 taken off again
# (measured: 1e-15).
PEFT_UPDATE = {"rtol": 1e-9, "atol": 1e-12}

# Of ΔW beside the same product written with indices: float64 on both sides.
SAME_UPDATE = {"rtol": 1e-13, "atol": 1e-14}

# By so much at least does an adapter change the output of a model, computed in float64.
MOVED = 1e-6

# Of the output after PEFT took the SVD of a float32 base weight again.
TWO_SVDS = 1e-5

# A dialect's own software works in float32: its ΔW agrees with ours to a few roundings of the largest entry.
CONFORMANCE = 2e-6

# A float32 forward pass of a loaded model against the same weights added by hand,
# near enough that a wrong scale or a lost module cannot hide.
LIVE_OUTPUT = {"rtol": 1e-6, "atol": 1e-5}

# Of an entry of QᵀQ - 1 where Q = X T is not formed: κ² ε, κ ≤ 40 (measured: 2e-13).
IMPLICIT = 1e-11

# Of a singular value of W + ΔW, relative to the largest, and of a score where the values lie 1e-2 apart: the vectors
# of W are kept in float32 (measured: 5e-9 and 5e-8); a score errs by this over the distance of its neighbours.
UPDATED_VALUE = 1e-7
SCORE = 1e-5

# The same where nothing is kept in float32: of the largest singular value (measured: 1e-15).
LANCZOS = 1e-12

# Of a written update whose new factors are float32, relative to the largest singular value of W + ΔW (measured: 1e-7).
MITIGATED = 1e-6

# Of a prediction of rounding from 8,192 entries, relative to that from all, at ‖ΔW‖/‖W‖ from 0.05 % to 3 % (measured:
# 0.4 % on Gaussian factors, 1.4 % on trained ones).
SAMPLED_ROUNDING = 0.03

# Of the predicted cost of rounding, relative to that of the merge itself (measured: 0.2 %).
PREDICTED_ROUNDING = 0.01

# Of the outputs of a model with an adapter on: the same sums in another order, float64 (measured: 2e-15); in a 16-bit
# model the sum of a rounded output and a float32 update, rounded again.
ATTACHED = {"rtol": 1e-10, "atol": 1e-12}
ATTACHED_16 = {"rtol": 2.0**-7, "atol": 1e-3}

# Of a whitened truncation beside full whitening with the covariance, relative to ‖ΔW‖ (measured: 5e-15, with the out
# side 3e-14), and of its errors.
WHITENED = 1e-12

# Of moments summed by hooks beside the same in NumPy; z in float64, and in float32.
MOMENTS = 1e-12
MOMENTS_32 = 1e-5

# Of an amplification and what it is made of, relative: float64 beside a dense float64 SVD (measured: 3e-13).
AMPLIFIED = 1e-10

# Of the same where torch works in float32 (measured: 2e-6).
SINGLE = 1e-5

# Of the projection of a float32 copy of W, beside that of W in float64; of singular values, relative to σ₁.
SINGLE_COPY = 2.0**-20

# Of the error of a truncation, measured on the factors, relative to ‖ΔW‖ (measured: 5e-14 at κ = 30; float64).
LOSS = 1e-12

# Of the same where float32 factors of it were rounded: 6e-8 √r.
LOSS_FLOAT32 = 1e-6

# Of ΔW', entry by entry, relative to the largest entry of ΔW: float64 factors made by two small matrices.
TRUNCATED = 1e-12

# Of a cosine, φ or share of energy of a collection, beside dense matrices: bases orthonormal to 1e-12 (measured:
# 3e-15).
COLLECTION = 1e-10

# Of φ, a cosine, CKA or a distance of two updates, beside their dense SVDs (measured: 2e-13).
SIMILARITY = 1e-10

# Of a principal angle, relative to itself where it is below 8°, beside 100 digits (measured: 2e-14 / angle).
ANGLE = {"rtol": 1e-9, "atol": 1e-14}

# Of a merged weight beside the dense float64 sum: half a unit in the last place for the rounding, and what D, the sum
# and DoRA's gain are rounded to float32, relative to the largest weight.
MERGED_UNITS = 0.5
MERGED_SINGLE = 2.0**-22

# Of an elementwise rule in the full space, whose blocks are float32, relative to the result (measured: 2e-7).
ELEMENTWISE = 2e-6

# Of the same in the small spaces: float64 (measured: 4e-15).
SMALL_SPACE = 1e-11

# Of the error of the range finder beyond that of the SVD, relative (measured: 4 % where σ falls slowly).
RANGE_FINDER = 0.06

# Of a threshold or a median of the Marchenko–Pastur law, relative to one by integrals and bisection (measured: 2e-9).
NOISE_EDGE = 1e-6

# Of the error of an extracted pair, relative to ‖D‖, beside the dense SVD in float64: factors rounded to float32.
EXTRACTED = 1e-6

# Of a model with an extracted adapter that holds all of the difference, beside the tuned model: float32 outputs.
EXTRACTED_OUTPUT = {"rtol": 1e-4, "atol": 1e-5}

# Of a combined update beside the dense rule, relative to the largest of the two norms and Σ|w|‖ΔW‖ (measured: 3e-15).
COMBINED = 1e-12

# Of the same where the rule is iterated (Karcher mean, HOOI), or blows up the smallest directions (polar factors).
COMBINED_ITERATED = 1e-9

# Of gain, error and norm of a merge as measured, relative: float32 sums within a block.
MEASURED_FIDELITY = 1e-4

# Of the corrections of error feedback: rank-one updates beside an inverse for each input, κ up to 1/λ = 1000.
FEEDBACK = {"rtol": 1e-8, "atol": 1e-8}

# Of a merged float32 weight beside PEFT's, relative to the largest of its tensor: float32 sums in another order
# (measured: 2e-7).
MERGED_BY_PEFT = 1e-6


# Of the logits of a merged float32 model beside base + adapter in PEFT, relative to what the adapter changes.
MERGED_OUTPUT = 1e-5

# Of the output of a saved adapter that PEFT, or we ourselves, load beside the model that trained it: factors and sums
# in float32 where the model is, PiSSA's first pair added and taken off again.
TRAINED_LIVE = {"rtol": 1e-5, "atol": 2e-5}

# Of what a combined DoRA adapter changes, relative to ‖W‖: its magnitudes are float32 (measured: 3e-8).
DORA_FILE = 2.0**-23

# Of an entry of a factor after six steps in two processes, beside one: float32 sums in another order (measured: 1e-7).
PROCESSES = {"rtol": 1e-5, "atol": 1e-6}

# Of a loss or a perplexity in float32, relative to a loop over single texts in float64: sums in float32.
EVALUATED = {"rel": 1e-5}

# Of the logits of a language model in llama.cpp, as a share of their mean absolute value: sums in another order
# (measured: 6e-4), weights rounded to 16 bits (2e-3, 1.1e-2), inputs of quantised weights rounded to 8 bits (3e-2).
ENGINE_FLOAT32 = 1e-3
ENGINE_FLOAT16 = 1e-2
ENGINE_BFLOAT16 = 5e-2
ENGINE_CODES = 5e-2
