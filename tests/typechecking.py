"""The checks of types that tests/conftest.py adds to the functions of diffusion_jax, quick where there are no shapes.

jaxtyping binds the arguments of a call to its signature before it compares shapes, which takes twenty times as long as
beartype's check of plain types. So beartype alone checks a signature without shapes. A check is made when its function
is first called, because a process calls few of the thousand functions that it imports.
"""

import functools
import inspect

import jaxtyping
from beartype import BeartypeConf, beartype

with_shapes = jaxtyping.jaxtyped
by_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float too, as for other type checkers


def has_shapes(function) -> bool:
    """Whether an annotation of the signature is jaxtyping's, or a string that may become one."""
    return any(isinstance(each, str) or "jaxtyping" in repr(each) for each in function.__annotations__.values())


def checked(function=None, *, typechecker):
    """What jaxtyping's import hook puts around a function or class."""
    if function is None:
        return functools.partial(checked, typechecker=typechecker)
    if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
        return with_shapes(function, typechecker=typechecker)
    if not function.__annotations__:
        return function

    @functools.cache
    def check():
        if has_shapes(function):
            return with_shapes(function, typechecker=typechecker)
        return typechecker(function)

    @functools.wraps(function)
    def call(*arguments, **named):
        return check()(*arguments, **named)

    return call


def install() -> None:
    """Let jaxtyping's import hook use `checked`."""
    jaxtyping.jaxtyped = checked
