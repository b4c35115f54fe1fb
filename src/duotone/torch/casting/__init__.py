"""Casting: every operation of a model in the dtype that it should have.

`cast` puts a model into its policy: how its weights are stored (`storage_plan`), and what happens around each forward
pass (`cast_forward`). Inside, operations have kinds (`operation_table`), carried out by `handlers` in a `region`; where
torch's own kernels do otherwise, `float32_inside` and `half_on_cpu` stand in. `keep_float32`, `own_kinds` and
`activation_checkpointing` are what an author may say about parts of a model. `duotone.torch` has the public verbs.
"""
