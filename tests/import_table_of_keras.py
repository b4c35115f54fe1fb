"""The part of the table of imports that is duotone.keras's."""

OF_KERAS = {
    # a framework of its own beside torch's and JAX's: the neutral core and itself
    "duotone.keras": (
        "duotone.call_site",
        "duotone.errors",
        "duotone.formats",
        "duotone.keras",
        "duotone.loss_scale",
        "duotone.operations",
        "duotone.policy",
        "duotone.wording",
    ),
    "duotone.keras.internals": ("duotone.errors",),
    "duotone.keras.backends": ("duotone.errors", "duotone.keras.internals"),
    "duotone.keras.loss_scale": (
        "duotone.errors",
        "duotone.keras.internals",
        "duotone.loss_scale",
        "duotone.policy",
    ),
    "duotone.keras.weights": (
        "duotone.errors",
        "duotone.keras.backends",
        "duotone.keras.internals",
        "duotone.keras.weights",
        "duotone.split_codec",
    ),
    "duotone.keras.policies": (
        "duotone.errors",
        "duotone.formats",
        "duotone.keras.internals",
        "duotone.keras.policies",
        "duotone.operations",
        "duotone.policy",
        "duotone.policy_spelling",
    ),
    # optimizers know no callback
    "duotone.keras.optim": (
        "duotone.errors",
        "duotone.formats",
        "duotone.keras.backends",
        "duotone.call_site",
        "duotone.keras.internals",
        "duotone.keras.loss_scale",
        "duotone.keras.optim",
        "duotone.keras.policies",
        "duotone.keras.weights",
        "duotone.loss_scale",
        "duotone.policy",
    ),
    # a callback sees the optimizer as a user does
    "duotone.keras.report": (
        "duotone.errors",
        "duotone.call_site",
        "duotone.keras.checking",
        "duotone.keras.internals",
        "duotone.keras.optim.loss_scale_optimizer",
        "duotone.keras.policies",
        "duotone.keras.report",
        "duotone.loss_scale",
        "duotone.policy",
        "duotone.wording",
    ),
}
