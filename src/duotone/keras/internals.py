"""Every name of Keras that is not public, and every difference of its versions, each with its reason.

No other module of `duotone.keras` imports `keras.src` or asks for a version.
"""
