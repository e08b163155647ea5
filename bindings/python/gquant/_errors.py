"""One exception class per status of the library. Each is also the builtin exception that callers would expect."""


class GquantError(Exception):
    """What all errors of this package have in common; its text says what was tried, on what, and what was wanted."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class InvalidArgumentError(GquantError, ValueError):
    """An argument is out of range, of the wrong dtype or size, not contiguous, or fits no other."""


class InvalidHandleError(GquantError, ValueError):
    """A model was closed, or a handle was never made."""


class NotFoundError(GquantError, FileNotFoundError, KeyError):
    """No such file, tensor, layer or name."""


class IoError(GquantError, OSError):
    """The system refused to read or write."""


class BadFileError(GquantError, ValueError):
    """A file's content breaks the rules of its format."""


class UnsupportedError(GquantError, NotImplementedError):
    """Valid, but not something that this build or device can do."""


class OutOfMemoryError(GquantError, MemoryError):
    """The host or a device has not enough memory."""


class CancelledError(GquantError, RuntimeError):
    """A job was cancelled."""


class FailedError(GquantError, RuntimeError):
    """A job ran and did not reach what was asked of it."""


class DeviceError(GquantError, RuntimeError):
    """A device's driver reported an error."""


class ForkedError(GquantError, RuntimeError):
    """This process was forked after the library was loaded, which the library does not survive."""


class InternalError(GquantError, RuntimeError):
    """A defect of the library. Every later call fails with it: restart the process."""


# By the numbers in the header.
BY_STATUS: dict[int, type[GquantError]] = {
    1: InvalidArgumentError,
    2: InvalidHandleError,
    3: NotFoundError,
    4: IoError,
    5: BadFileError,
    6: UnsupportedError,
    7: OutOfMemoryError,
    8: CancelledError,
    9: FailedError,
    10: DeviceError,
    11: ForkedError,
    12: InternalError,
}
