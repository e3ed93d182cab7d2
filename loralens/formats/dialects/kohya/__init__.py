"""The dialect of kohya's sd-scripts and musubi-tuner."""
