"""Arguments of transformers' common interfaces that have one meaning here, and may be passed so.

Its pipelines, trainers and chat templates pass many arguments whose value asks for nothing. Those
are taken; a value that would ask for something this package does not do is refused by its name.
"""


def expect_neutral(given: dict, neutral: dict[str, tuple]):
    """Refuses values that are neither None nor among the `neutral` ones of their name.

    Raises ValueError for such a value, TypeError for a name that `neutral` lacks.
    """
    for name, value in given.items():
        if name not in neutral:
            raise TypeError(f"expected arguments among {sorted(neutral)}, got {name!r}")
        allowed = neutral[name]
        if value is not None and not any(_same(value, other) for other in allowed):
            wanted = " or ".join(map(repr, allowed)) or "None"
            raise ValueError(f"expected {name} {wanted}, got {value!r}")


def _same(value, other) -> bool:
    return _plain(value) == _plain(other) and isinstance(value, bool) == isinstance(other, bool)


def _plain(value):
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, (list, tuple)) else value
