"""Every private or undocumented name of torch that Duotone uses, each in one place.

Names of objects are looked up when this is imported, by `lookup.find`; `lookup.HAS` says which of them this torch has.
Names of attributes that torch sets on its objects are constants in capitals, asked for at each use. Where a name is
missing, what stands here does the same by public means, does without it, or raises a `BackendError` that says what does
not work. Links are to torch 2.13. Left out: what reads `torch.utils.checkpoint` from the inside stands in
`casting/recomputation.py`.
"""
