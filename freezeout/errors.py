"""The errors that a user's mistake raises, in one tree.

`except FreezeOutError` catches them all; each is also the built-in exception that a reader of the
code would expect (`ValueError`, `TypeError`, ...). The command line prints them as one line.
"""


class FreezeOutError(Exception):
    """Base of every error that this library raises because of what it was given."""


class InvalidValue(FreezeOutError, ValueError):
    """A value outside its allowed range; the message names the value and the range."""


class InvalidType(FreezeOutError, TypeError):
    """An object of the wrong kind; the message names the kind given and the kinds allowed."""


class LayerOrderError(FreezeOutError, ValueError):
    """The layers' order is not the order of execution; the message names the modules."""


class CheckpointError(FreezeOutError, ValueError):
    """A state that belongs to another configuration, or that cannot be read."""


class DataError(FreezeOutError, OSError):
    """A data set that is missing, damaged or cannot be downloaded."""


class CacheError(FreezeOutError, RuntimeError):
    """The cache cannot go on: a served forward pass failed, or its files cannot be used."""
