"""What a user may do between two calls of a compiled model: the rows of the table in ``docs/guarantees.md``.

Each module below notes its rows when it is imported; their order is the table's.
"""

# isort: off
from tests.actions import numbers, modules, adapters, calls
# isort: on
from tests.actions.numbers import NUMBERS
from tests.actions.table import GROUPS, Call, ids, small

__all__ = ["GROUPS", "NUMBERS", "Call", "adapters", "calls", "ids", "modules", "numbers", "small"]
