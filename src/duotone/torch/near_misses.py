"""What people write who know torch.amp, Apex, DeepSpeed or Accelerate, and what they want is called here."""

from collections.abc import Iterable, Mapping

from duotone.errors import nearest_names

_SCALES_BY_ITSELF = "scaler.step updates the scale by itself, once, after all optimizers: leave the call out"
_PREPARE = "prepare(model, optimizer, policy) casts, keeps masters and makes the scaler"
_WRAP = "MasterWeights(optimizer) puts FP32 masters around any torch optimizer"
_AVERAGE = "Average(model, decay=0.999) is an FP32 average of the masters"
_SETTINGS = "scaler.settings has how the scale moves"
_FULLY_SHARD = "fully_shard(model) is FSDP2 for a cast model"
_DATA_PARALLEL = "data_parallel(model) is DistributedDataParallel for a cast model"
_SAVE = (
    "save_checkpoint(path, model, optimizer, scaler) saves all that the next step depends on, load_checkpoint loads it"
)

OF_SCALER = {
    "update": _SCALES_BY_ITSELF,
    "update_scale": _SCALES_BY_ITSELF,
    "get_scale": "scaler.loss_scale is the scale, a device scalar; float(scaler.loss_scale) waits for it",
    "cur_scale": "scaler.loss_scale is the scale, a device scalar",
    "is_enabled": "scaler.settings.is_none says whether nothing is scaled",
    "get_growth_factor": _SETTINGS,
    "get_backoff_factor": _SETTINGS,
    "get_growth_interval": _SETTINGS,
    "scale_loss": "scaler.backward(loss) scales a loss and runs its backward pass",
    "unscale": "scaler.unscale_(optimizer) makes gradients true in place",
    "unscale_gradients": "scaler.unscale_(optimizer) makes gradients true in place",
    "clip_grad_norm_": "scaler.step(optimizer, clip_norm=1.0) clips the true gradient",
    "minimize": "scaler.backward(loss), then scaler.step(optimizer)",
    "zero_grad": "optimizer.zero_grad() does it",
}
OF_MODULE = {
    "Adam": "AdamW(params, weight_decay=0.0) is Adam; for L2 decay take MasterWeights(torch.optim.Adam(params))",
    "FusedAdam": "AdamW is fused",
    "FusedSGD": "SGD is fused",
    "FusedLAMB": _WRAP,
    "FP16_Optimizer": _WRAP,
    "BF16_Optimizer": _WRAP,
    "amp": "autocast and GradScaler are here themselves",
    "initialize": _PREPARE,
    "half": "cast(model, policy) puts a model into 16 bits",
    "bfloat16": "cast(model, policy) puts a model into 16 bits",
    "scale_loss": "LossScaler has backward(loss)",
    "DynamicLossScaler": "LossScaler(policy) finds the scale by itself",
    "DynamicLossScale": "LossScale.dynamic() is how a scale moves, LossScaler(policy) what scales",
    "StaticLossScale": "LossScale.static(scale) is a scale that stays",
    "master_params": "master_weights(model) returns the FP32 masters by name",
    "clip_grad_norm_": "LossScaler has step(optimizer, clip_norm=1.0), which clips the true gradient",
    "checkpoint": "checkpoint_activations(model, pattern) is activation checkpointing; to save a run, save_checkpoint",
    "save": _SAVE,
    "load": _SAVE,
    "DistributedDataParallel": _DATA_PARALLEL,
    "DDP": _DATA_PARALLEL,
    "FullyShardedDataParallel": _FULLY_SHARD,
    "FSDP": _FULLY_SHARD,
    "EMA": _AVERAGE,
    "EMAModel": _AVERAGE,
    "ModelEma": _AVERAGE,
    "AveragedModel": _AVERAGE,
    "custom_fwd": "op_rule gives a function of one's own its kind",
    "custom_bwd": "op_rule gives a function of one's own its kind",
}


def missing(owner: str, name: str, hints: Mapping[str, str], known: Iterable[str]) -> str:
    """Return what to say of a name that something has not got.

    Args:
        owner: what has not got it.
        name: the name.
        hints: what is wanted by those who write a name.
        known: the names that there are.

    >>> missing("a LossScaler", "update", OF_SCALER, [])
    'a LossScaler has no attribute "update"; scaler.step updates the scale by itself, once, after all optimizers: ...'
    >>> missing("duotone.torch", "Cast", {}, ["cast", "uncast"])
    'duotone.torch has no attribute "Cast"; did you mean cast or uncast?'
    """
    text = f'{owner} has no attribute "{name}"'
    # others ask for such names to see what something is
    if name.startswith("_"):
        return text
    hint = hints.get(name)
    return f"{text}; {hint or nearest_names(name, [each for each in known if not each.startswith('_')])}"
