"""By which path a weight is known inside of its model, whoever built the model and however it was loaded.

    encoder/dense/kernel     the names of the layers that it is in, from the outermost in, and its own

Keras' `variable.path` is made while a layer is built, with the model's name before it or not, and a model that was
loaded is built in another order than the one that was saved. Layers' names are saved.
"""

import keras

from duotone.errors import OptimizerError
from duotone.keras import internals
from duotone.keras.policies.places import layers_inside


def weights_by_path(model: keras.Model) -> dict[str, keras.Variable]:
    """Return a model's weights by their paths in it, in the order of `model.weights`.

    Raises:
        OptimizerError: two weights have the same path.

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="head")], name="net")
    >>> list(weights_by_path(model))
    ['head/kernel', 'head/bias']
    """
    layer_of: dict[int, str] = {}
    for path, layer in [("", model), *((path, layer) for path, layer, _ in layers_inside(model))]:
        layer_of |= {id(variable): path for variable in internals.variables_of(layer)}
    found: dict[str, keras.Variable] = {}
    for weight in model.weights:
        path = f"{layer_of[id(weight)]}/{weight.name}".lstrip("/") if id(weight) in layer_of else weight.path
        if path in found:
            raise OptimizerError(
                f'two weights of the model have the path "{path}"; give their layers names of their own'
            )
        found[path] = weight
    return found
