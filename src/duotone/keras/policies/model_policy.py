"""One policy for the layers of a model: a dtype policy of Keras' that answers each layer by its path and its class.

Keras gives every layer that is made without a `dtype` the global policy, and a layer asks it for its dtypes when it is
called or built. `ModelPolicy` is such a policy. Once a layer is built, it is left with a plain policy of Keras', so
what is saved loads without Duotone, and what runs is what Keras runs.

Left out: layers that are given a `dtype` of their own keep it; functions of `keras.ops` between layers have the dtypes
of their operands.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import keras

from duotone.errors import PolicyError
from duotone.keras import internals
from duotone.keras.policies import roles
from duotone.keras.policies.built_model import apply_policy
from duotone.keras.policies.places import Places, check_rules_hold
from duotone.keras.policies.safety import is_loaded_with_one_policy, safe_roles
from duotone.policy import Policy
from duotone.policy_spelling import merge


@keras.saving.register_keras_serializable(package="duotone")
class ModelPolicy(keras.dtype_policies.DTypePolicyMap):
    """A dtype policy of Keras' that gives each layer its own, by a policy of Duotone's; made by `policy`.

    As a map it holds what layers are given by `layer.dtype_policy = ...` before they are built, by their paths.

    Attributes:
        policy: the policy of Duotone's.
    """

    def __init__(self, policy: str | Policy) -> None:
        self.policy = roles.read(policy)
        self._plain = keras.DTypePolicy(roles.keras_name(self.policy))
        super().__init__(self._plain)
        self._places = Places()
        self._held: set[int] = set()
        # layers that have their own policy by now, with their paths, and those around them that are not built yet
        self._settled: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
        self._open: WeakSet[Any] = WeakSet()
        # whether the rules wait to be checked, and whether that has failed
        self._is_unchecked = self._has_failed = False
        self._before = threading.local()

    @property
    def compute_dtype(self) -> str:
        """The dtype in which the layer that asks computes; of the whole policy, if no layer asks."""
        return self._answer().compute_dtype

    @property
    def variable_dtype(self) -> str:
        """The dtype of the variables of the layer that asks; of the whole policy, if no layer asks."""
        return self._answer().variable_dtype

    @property
    def name(self) -> str:
        """The name of Keras' policy for the layer that asks; of the whole policy, if no layer asks."""
        return self._answer().name

    def __getitem__(self, path: str) -> keras.DTypePolicy:
        """Return Keras' policy for the layer that asks, which is at `path`; of the whole policy, if no layer asks."""
        return super().__getitem__(path) if path in self else self._answer()

    def __bool__(self) -> bool:
        """Return True, also where no layer was given a policy by its path."""
        return True

    def __enter__(self) -> ModelPolicy:
        """Make this the global policy of this thread until the end of the block."""
        stack = self._before.__dict__.setdefault("stack", [])
        if not stack and not self._is_unchecked:
            # each block's rules have to hold in it
            self._held.clear()
        stack.append(keras.config.dtype_policy())
        keras.config.set_dtype_policy(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the global policy back that was there.

        Raises:
            PolicyError: a rule holds for none of the layers made in the block; if some are not built yet, the model's
                first call raises it.
        """
        keras.config.set_dtype_policy(self._before.stack.pop())
        if error is None:
            self._settle_open()
            self._is_unchecked = True
            self._check_rules()

    def __str__(self) -> str:
        """Return the shortest text of the policy; `policy` reads it."""
        return self.policy.name

    def __repr__(self) -> str:
        """Return it as it is made."""
        return f'policy("{self}")'

    def __eq__(self, other: object) -> bool:
        """Return whether the other gives every layer the same."""
        return isinstance(other, ModelPolicy) and self.policy == other.policy

    def __hash__(self) -> int:
        """Return the hash of the policy."""
        return hash(self.policy)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how a copy is made: it has seen no layers."""
        return ModelPolicy, (self.policy,)

    def get_config(self) -> dict[str, str]:
        """Return what layers that are not built yet save."""
        return {"policy": str(self.policy)}

    @classmethod
    def from_config(cls, config: dict[str, str], custom_objects: object = None) -> ModelPolicy:
        """Return the policy that is read from a file, or the one that is in use, if that is the same.

        Layers that Keras copies by their configuration, as Bidirectional does, are then the same policy's.
        """
        found = cls(config["policy"])
        active = keras.config.dtype_policy()
        return active if isinstance(active, ModelPolicy) and active == found else found

    def apply(self, model: keras.Model) -> None:
        """Give the layers of a built model what they compute in by this policy; their variables stay as they are.

        Raises:
            PolicyError: a variable would need another dtype, or a rule holds for no layer. Nothing is changed then.

        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(2, name="head")])
        >>> ModelPolicy("bf16-mixed; head: float32").apply(model)
        >>> [layer.compute_dtype for layer in model.layers]
        ['bfloat16', 'float32']
        """
        apply_policy(self, model)

    def of_layer(self, layer: Any, places: Places, paths: list[str]) -> tuple[keras.DTypePolicy, set[int]]:
        """Return Keras' policy for a layer that may be known by several dotted paths, and the rules that hold for it.

        Raises:
            PolicyError: the rules give it roles that Keras cannot have together.
        """
        changes: list[dict[str, Any]] = [dict(safe_roles(layer, places.around(paths[0])))]
        held = set()
        for number, rule in enumerate(self.policy.rules):
            found = [path for path in paths if rule.holds_for(path, places.classes)]
            if not found:
                continue
            held.add(number)
            given = dict(rule.roles)
            # what a layer returns is its own, not that of the layers inside
            is_own = any(rule.matches(path, places.classes) for path in found)
            if given.pop("output", None) == "float32" and "compute" not in given and is_own:
                if internals.sublayers(layer):
                    raise PolicyError(
                        f'rule "{rule}" holds for {paths[0]}, which has layers inside, and Keras gives it no output '
                        f'format of its own; write "{rule.pattern}: float32", or name the last layer inside'
                    )
                given |= {"param": "float32", "compute": "float32"}
            changes.append(given)
        return roles.combined(self.policy, merge(changes), paths[0]), held

    def _answer(self) -> keras.DTypePolicy:
        """Return the policy of the layer that asks through a property of this."""
        layer = internals.asking_layer(self, depth=2)
        if layer is None:
            return self._plain
        scopes = internals.scopes()
        self._places.add(scopes)
        # the layers around it are built after it
        self._open.update(caller for _, caller in scopes if getattr(caller, "dtype_policy", None) is self)
        path = internals.path_of(layer)
        # a functional model is built by its constructor
        is_placed = path is not None or isinstance(layer, keras.Model)
        if path is None:
            path = f"{scopes[-1][0]}/{layer.name}" if scopes and scopes[-1][1] is not layer else layer.name
        found, held = self._decide(layer, path)
        if is_placed and layer.built:
            self._settle(layer, path, found, held)
            if self._has_failed or (scopes and scopes[0][1] is layer):
                try:
                    self._check_rules()
                except PolicyError:
                    # on torch Keras tries to build a model twice and hides the first error: this layer is to ask again
                    internals.set_policy(layer, self)
                    self._has_failed = True
                    raise
        return found

    def _decide(self, layer: Any, path: str) -> tuple[keras.DTypePolicy, set[int]]:
        """Return Keras' policy for a layer at a path of Keras', and the rules that hold for it."""
        paths = self._places.add_layer(path, layer)
        return self.of_layer(layer, self._places, paths)

    def _settle(self, layer: Any, path: str, found: keras.DTypePolicy, held: set[int]) -> None:
        """Leave a layer that is built with its own policy."""
        if not isinstance(layer, keras.layers.InputLayer):
            self._held |= held
        self._check_inside(layer, path, held)
        internals.set_policy(layer, found)
        self._settled[layer] = path
        self._open.discard(layer)
        # those that Keras did not call while it built the layer, and inputs
        inside = internals.sublayers(layer)
        for each in inside:
            if each.built and each.dtype_policy is self:
                place = internals.path_of(each) or f"{path}/{each.name}"
                self._settle(each, place, *self._decide(each, place))
        if is_loaded_with_one_policy(layer):
            different = {each.path: each.dtype_policy for each in inside if each.dtype_policy != found}
            # those without variables have no path, by which a map could say their policies
            different.pop(None, None)
            if different:
                internals.set_policy(layer, keras.dtype_policies.DTypePolicyMap(found.name, different))
        self._settle_open()

    def _settle_open(self) -> None:
        """Leave layers around others, which may never be called themselves, with their own policies."""
        for layer in [each for each in self._open if each.built and internals.path_of(each) is not None]:
            if layer in self._open:
                path = str(internals.path_of(layer))
                self._settle(layer, path, *self._decide(layer, path))

    def _check_inside(self, model: Any, path: str, held: set[int]) -> None:
        """Raise if a rule holds for a model whose layers were built before it was, at paths of their own."""
        if not held:
            return
        for layer in internals.sublayers(model):
            before = self._settled.get(layer)
            if before is None or before.startswith(f"{path}/"):
                continue
            inside = f"{path}/{before}"
            paths = [*self._places.add_layer(before, layer), *self._places.add_layer(inside, layer)]
            if self.of_layer(layer, self._places, paths)[0] != layer.dtype_policy:
                rule = self.policy.rules[max(held)]
                raise PolicyError(
                    f'rule "{rule}" holds for the model {path}, but its layers were built before it, such as {before} '
                    f"in {layer.dtype_policy.name}; name the layers in the rule, or make that model in a "
                    "`with dk.policy(...)` of its own"
                )

    def _check_rules(self) -> None:
        """Raise if the block is over, every layer made in it is built, and a rule holds for none."""
        if not self._is_unchecked:
            return
        if len(self._held) < len(self.policy.rules):
            if internals.unbuilt_layers(self):
                return
            check_rules_hold(self.policy, self._held, self._places)
        self._is_unchecked = self._has_failed = False
