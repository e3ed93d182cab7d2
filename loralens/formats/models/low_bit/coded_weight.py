"""The types of low-bit weights under their old path; they are in `loralens.core.coded_weight`.

Merging moves codes and must not import a reader, as both rooms stand on the same floor.
"""

from loralens.core.coded_weight import CodedWeight as CodedWeight
from loralens.core.coded_weight import Codes as Codes
from loralens.core.coded_weight import GridRows as GridRows
