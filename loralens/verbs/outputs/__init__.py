"""The outputs of the verbs: results, targets and dialects of what is written, and what rounding costs."""
