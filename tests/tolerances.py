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

# Of an inner product, relative to the product of the four Frobenius norms.
INNER = 1e-14

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
