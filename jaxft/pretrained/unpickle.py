"""Interprets a pickle as plain data: containers, tensors, and stand-ins for everything else.

Nothing that a pickle names is imported or called. Time and memory are linear in the pickle's size: types are checked
before anything is hashed, formatted or multiplied, and the number of operations is bounded.
"""

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

STORAGES = {  # torch's storage classes of the dtypes that weights have
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
MAX_OPERATIONS = 1_000_000  # of a pickle; a ResNet-152 with Adam's state has 50,000
_MAX_AXES = 16
MAX_KEY = 1000  # characters; no tensor has a longer name
_LARGEST = 2**62  # of any size, offset or stride
_SIMPLE_KEYS = (str, bool, float, type(None))


class RefusedError(Exception):
    """The file holds something that no weights file needs."""


class Tensor(NamedTuple):
    """A tensor in a file, before its numbers are read."""

    dtype: np.dtype
    shape: tuple[int, ...]
    storage: str  # its key in the file
    offset: int = 0  # in elements
    strides: tuple[int, ...] = ()  # in elements


class Foreign:
    """A stand-in for an object of any other class, or for the class itself. It has no behaviour."""

    __slots__ = ("attributes", "items", "name")

    def __init__(self, name: str) -> None:
        self.name = name  # of the class, with its module
        self.items: dict[Any, Any] | None = None  # of a subclass of dict
        self.attributes: dict[Any, Any] | None = None


class _Storage(NamedTuple):
    dtype: np.dtype
    key: str


def children(value: Any) -> dict[Any, Any]:
    """Returns the items of a dict, a list or a stand-in for a subclass of dict; {} for other values."""
    if isinstance(value, Foreign):
        return value.items or {}
    if type(value) is dict:
        return value
    return dict(enumerate(value)) if type(value) in (list, tuple) else {}


class Unpickler:
    """Interprets one or more pickles that follow each other in a file."""

    def __init__(self) -> None:
        self.storages: dict[str, np.dtype] = {}  # of all tensors that were seen
        self._operations = 0

    def load(self, file: Any) -> Any:
        """Returns the object of the next pickle in a file that has read, readline and tell.

        Raises RefusedError, or almost anything if the pickle is damaged.
        """
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(file):
            self._count(1)
            if opcode.name == "STOP":
                break
            if opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name])
            elif opcode.name in _LITERALS:
                self._stack.append(argument)
            elif opcode.name not in _IGNORED:
                _OPERATIONS[opcode.name](self, argument)
        (result,) = self._stack
        return result

    def _count(self, number: int) -> None:
        self._operations += number
        if self._operations > MAX_OPERATIONS:
            raise RefusedError(f"its pickle has more than {MAX_OPERATIONS:,} operations")

    # ---- the stack and the memo ----

    def _since_mark(self) -> list[Any]:
        """Pops the values above the last mark, and the mark."""
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("a mark is missing")
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def _push_mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def _pop(self, _: Any) -> None:
        self._stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    # ---- containers ----

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _short_tuple(self, length: int) -> None:
        values = tuple(self._stack[-length:])
        if len(values) < length:
            raise ValueError("the stack is empty")
        self._stack[-length:] = [values]

    def _new_list(self, _: Any) -> None:
        self._stack.append([])

    def _list(self, _: Any) -> None:
        self._stack.append(self._since_mark())

    def _append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is list:  # a subclass's or a set's elements are of no use
            self._stack[-1].extend(values)

    def _new_dict(self, _: Any) -> None:
        self._stack.append({})

    def _dict(self, _: Any) -> None:
        values = self._since_mark()
        self._stack.append({})
        self._set(values)

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _set_items(self, _: Any) -> None:
        self._set(self._since_mark())

    def _set(self, values: list[Any]) -> None:
        """Sets the items of the topmost dict, given as key, value, key, value, ..."""
        target = self._stack[-1]
        if isinstance(target, Foreign):
            target.items = target.items or {}
            target = target.items
        if type(target) is not dict:
            raise ValueError("items are set on something that is not a dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[_hashable(key)] = value

    def _new_set(self, _: Any) -> None:
        self._stack.append(Foreign("builtins.set"))

    def _frozenset(self, _: Any) -> None:
        self._since_mark()
        self._new_set(None)

    # ---- objects ----

    def _global(self, name: str) -> None:
        self._stack.append(Foreign(name.replace(" ", ".", 1)))

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("a class's name is not text")
        self._count((len(name) + len(module)) // 100)  # both may come from the memo
        self._stack.append(Foreign(f"{module}.{name}"))

    def _extension(self, code: int) -> None:
        self._stack.append(Foreign(f"copyreg.extension{code}"))

    def _inst(self, name: str) -> None:
        self._since_mark()
        self._global(name)

    def _obj(self, _: Any) -> None:
        cls, *_rest = self._since_mark()
        self._stack.append(self._call(cls, ()))

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(function, arguments))

    def _new_object(self, _: Any) -> None:
        self._reduce(None)

    def _new_object_ex(self, _: Any) -> None:
        self._stack.pop()  # keyword arguments
        self._reduce(None)

    def _build(self, _: Any) -> None:
        """Sets the attributes of a stand-in, for pickle's BUILD. Those of other objects are dropped."""
        state = self._stack.pop()
        if type(state) is tuple and len(state) == 2:  # __dict__ and __slots__
            state = state[0]
        if isinstance(self._stack[-1], Foreign) and type(state) is dict:
            self._stack[-1].attributes = state

    def _call(self, function: Any, arguments: Any) -> Any:
        """Returns the result of a known function of torch or collections, or a stand-in. Nothing is called."""
        if not isinstance(function, Foreign) or type(arguments) is not tuple:
            raise ValueError("something that is not a function is called")
        name = function.name
        if name == "collections.OrderedDict":
            return self._ordered_dict(arguments)
        if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return _tensor(*arguments[:4])
        if name in _PARAMETERS and arguments:
            return arguments[0]
        if name == "_codecs.encode" and arguments and type(arguments[0]) is str:
            return arguments[0]  # how protocol 2 writes bytes, which _hashable explains
        if name == "torch._tensor._rebuild_from_type_v2" and len(arguments) == 4:  # a tensor that has attributes
            inner, _, inner_arguments, _ = arguments
            if isinstance(inner, Foreign) and inner.name != name:
                return self._call(inner, inner_arguments)
        return Foreign(name)

    def _ordered_dict(self, arguments: tuple[Any, ...]) -> dict[Any, Any]:
        """Returns a dict; Python 2 passed a list of its items."""
        pairs = arguments[0] if arguments else []
        if type(pairs) is not list:
            raise ValueError("an OrderedDict is made of something that is not a list")
        self._count(len(pairs))
        if any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in pairs):
            raise ValueError("an OrderedDict is made of something that is not a list of pairs")
        return {_hashable(key): value for key, value in pairs}

    def _persistent(self, _: Any) -> None:
        """Replaces a persistent id by the object that it stands for.

        The id is ("storage", class, key, location, number of elements, ...) or ("module", class, file, source code).
        """
        pid = self._stack.pop()
        if type(pid) is tuple and len(pid) == 4 and type(pid[0]) is str and pid[0] == "module":
            self._stack.append(pid[1])
            return
        if type(pid) is not tuple or not 5 <= len(pid) <= 6 or not isinstance(pid[1], Foreign):
            raise ValueError("a storage is described otherwise than by torch")
        if type(pid[0]) is not str or pid[0] != "storage" or type(pid[2]) is not str:
            raise ValueError("a storage is described otherwise than by torch")
        dtype = STORAGES.get(pid[1].name)
        if dtype is None or (len(pid) == 6 and pid[5] is not None):  # of another type, or a view in torch 0.1's format
            self._stack.append(Foreign(pid[1].name))
        elif self.storages.setdefault(pid[2], dtype) != dtype:
            raise ValueError("a storage has two types")
        else:
            self._stack.append(_Storage(dtype, pid[2]))

    def _unsupported(self, _: Any) -> None:
        raise ValueError("an operation that torch.save does not use")


def _hashable(key: Any) -> Any:
    """Returns the key, or a stand-in for one that could take long to hash or search, such as a nested tuple.

    Bytes become text: they are the text of a pickle of Python 2 that was loaded with encoding="bytes".
    """
    if type(key) in (str, bytes) and len(key) > MAX_KEY:
        return Foreign(f"{type(key).__name__} longer than {MAX_KEY:,} characters")
    if type(key) is bytes:
        return key.decode("latin-1")
    if type(key) in _SIMPLE_KEYS or (type(key) is int and abs(key) < _LARGEST):
        return key
    return key if isinstance(key, Foreign) else Foreign(type(key).__name__)


def _tensor(storage: Any = None, offset: Any = None, shape: Any = None, strides: Any = None) -> Tensor | Foreign:
    """Returns a tensor, or a stand-in if its storage has a type that weights do not have."""
    if isinstance(storage, Foreign):
        return storage
    sizes = [offset, *(shape if type(shape) is tuple else ()), *(strides if type(strides) is tuple else ())]
    if type(storage) is not _Storage or type(shape) is not tuple or type(strides) is not tuple:
        raise ValueError("a tensor is described otherwise than by torch")
    if len(shape) > _MAX_AXES or len(shape) != len(strides):
        raise ValueError(f"a tensor has {len(shape)} axes and {len(strides)} strides")
    if not all(type(size) is int and 0 <= size < _LARGEST for size in sizes):
        raise ValueError("a tensor's size is not a number in range")
    return Tensor(storage.dtype, shape, storage.key, offset, strides)


_MARK = object()
_PARAMETERS = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    "torch.nn.parameter.Parameter",
)
_IGNORED = ("PROTO", "FRAME", "READONLY_BUFFER")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_OPERATIONS: dict[str, Callable[[Unpickler, Any], None]] = {
    "MARK": Unpickler._push_mark,
    "POP": Unpickler._pop,
    "POP_MARK": Unpickler._pop_mark,
    "DUP": Unpickler._dup,
    "PUT": Unpickler._put,
    "BINPUT": Unpickler._put,
    "LONG_BINPUT": Unpickler._put,
    "MEMOIZE": Unpickler._memoize,
    "GET": Unpickler._get,
    "BINGET": Unpickler._get,
    "LONG_BINGET": Unpickler._get,
    "TUPLE": Unpickler._tuple,
    "TUPLE1": lambda self, _: self._short_tuple(1),
    "TUPLE2": lambda self, _: self._short_tuple(2),
    "TUPLE3": lambda self, _: self._short_tuple(3),
    "EMPTY_LIST": Unpickler._new_list,
    "LIST": Unpickler._list,
    "APPEND": Unpickler._append,
    "APPENDS": Unpickler._appends,
    "EMPTY_DICT": Unpickler._new_dict,
    "DICT": Unpickler._dict,
    "SETITEM": Unpickler._set_item,
    "SETITEMS": Unpickler._set_items,
    "EMPTY_SET": Unpickler._new_set,
    "ADDITEMS": Unpickler._appends,
    "FROZENSET": Unpickler._frozenset,
    "GLOBAL": Unpickler._global,
    "STACK_GLOBAL": Unpickler._stack_global,
    "EXT1": Unpickler._extension,
    "EXT2": Unpickler._extension,
    "EXT4": Unpickler._extension,
    "INST": Unpickler._inst,
    "OBJ": Unpickler._obj,
    "REDUCE": Unpickler._reduce,
    "NEWOBJ": Unpickler._new_object,
    "NEWOBJ_EX": Unpickler._new_object_ex,
    "BUILD": Unpickler._build,
    "BINPERSID": Unpickler._persistent,
    "PERSID": Unpickler._unsupported,
    "NEXT_BUFFER": Unpickler._unsupported,
}
