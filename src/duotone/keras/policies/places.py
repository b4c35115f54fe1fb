"""Where layers are: dotted paths and classes, by which the rules of a policy find them.

Keras' paths have slashes and begin with the model's name, if its layers are built with it: `net/block/norm`. A rule's
pattern has dots, and may leave the model's name out: `block.norm`.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import keras

from duotone.errors import PolicyError, nearest_names
from duotone.keras import internals
from duotone.policy import Policy


class Places:
    """The layers that were seen, by dotted path.

    Attributes:
        classes: path to the names of a layer's class and of that class's bases, as rules take them.
    """

    def __init__(self) -> None:
        self.classes: dict[str, tuple[str, ...]] = {}
        self._models: set[str] = set()

    def add(self, scopes: Iterable[tuple[str, Any]]) -> None:
        """Add the layers whose name scopes are open, by their paths of Keras'."""
        for path, layer in scopes:
            if layer is not None:
                self.add_layer(path, layer)

    def add_layer(self, path: str, layer: Any) -> list[str]:
        """Add a layer at a path of Keras', and return the dotted paths by which a rule can find it."""
        dotted = path.replace("/", ".")
        if "/" not in path and isinstance(layer, keras.Model):
            self._models.add(dotted)
        model, _, inside = dotted.partition(".")
        paths = [dotted, inside] if inside and model in self._models else [dotted]
        for each in paths:
            self.classes[each] = class_names(layer)
        return paths

    def around(self, path: str) -> tuple[str, ...]:
        """Return the names of the classes of the layer around the one at a dotted path."""
        return self.classes.get(path.rpartition(".")[0], ())


def layers_inside(model: Any) -> Iterator[tuple[str, Any, Sequence[str]]]:
    """Yield each layer inside a model with its path and the classes of the layer that it is in."""
    seen = {id(model)}
    waiting: list[tuple[str, Any]] = [("", model)]
    while waiting:
        path, outer = waiting.pop(0)
        for layer in internals.sublayers(outer):
            if id(layer) in seen or isinstance(layer, keras.layers.InputLayer):
                continue
            seen.add(id(layer))
            own = f"{path}/{layer.name}".lstrip("/")
            yield own, layer, class_names(outer)
            waiting.append((own, layer))


def class_names(layer: Any) -> tuple[str, ...]:
    """Return the names of a layer's class and of its bases down to Layer.

    >>> class_names(keras.layers.ReLU())
    ('ReLU', 'Layer')
    """
    return tuple(cls.__name__ for cls in type(layer).__mro__ if issubclass(cls, keras.layers.Layer))


def check_rules_hold(policy: Policy, held: Collection[int], places: Places) -> None:
    """Raise unless each rule of a policy is among those that hold for some layer.

    Raises:
        PolicyError: one is not; the message names the paths or classes that are nearest.
    """
    for number, rule in enumerate(policy.rules):
        if number in held:
            continue
        known = sorted(places.classes)
        if rule.pattern.startswith("type="):
            known = sorted({f"type={name}" for names in places.classes.values() for name in names})
        hint = nearest_names(rule.pattern, known) if known else "no layer was built"
        raise PolicyError(f'rule "{rule}" holds for no layer that was made without a dtype of its own; {hint:.300}')
