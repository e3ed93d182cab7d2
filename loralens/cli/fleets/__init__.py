"""The sub-commands of `loralens fleet`, one subject in each file."""
