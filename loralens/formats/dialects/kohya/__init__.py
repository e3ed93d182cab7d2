"""kohya's sd-scripts, musubi-tuner and kin."""
