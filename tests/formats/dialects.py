"""The dialects as `loralens.formats.FORMATS` has them: each detects, reads and writes the content of a file."""

from loralens.formats import FORMATS

FORM = {form.name: form for form in FORMATS}
