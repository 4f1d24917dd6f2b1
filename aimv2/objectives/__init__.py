"""What the training loop learns: for each objective a config, and the plain `nn.Module` that it builds.

Every config has `vision`, `vocab_size`, `data_patch_size`, `build()`, `check(data)` and `training_flops(tokens)`; every
module has an `encoder`, `exported` (what a run leaves behind, with a `config`), and

    forward(batch, counts) -> {"loss": ..., ...}

the losses of a micro-batch, as shares of those of the optimizer step: `counts` are the targets of all its micro-batches
and ranks.

The loop asks by name for what only some have. Configs: `decoder` or `text`, the towers that they have beside the
encoder; `needs_weights`, that one of them is locked; `check_engine(batch_size, zero_stage)`; `check_sources(data)`,
which opens what is learned from. Modules: `fingerprints()` of that; `prepare(data)`, once the engine has placed the
module; `look_ahead(micro_batches, counts)`, before a step's first forward.
"""
