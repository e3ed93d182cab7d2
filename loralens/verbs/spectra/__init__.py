"""One adapter measured: its content, spectra, faults, and its relation to the base."""
