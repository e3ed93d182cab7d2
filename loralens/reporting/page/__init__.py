"""The parts of a report as HTML, piece by piece."""
