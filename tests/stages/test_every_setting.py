"""A misspelt or mistyped key, anywhere in a config, is one line; a table of them."""

import copy

import pytest
from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope
from support import harness

from dpa_xtuner.errors import DPAError
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.build import check_ahead, stage_config
from dpa_xtuner.stages.run import Run

# What is set on the command line, and what the message says of it.
WRONG = """
promt_template=x | did you mean 'prompt_template'
precision=bf61 | precision: Input should be
precision=3 | precision: Input should be
model.precision=bf16 | set precision instead
log_to=wandbb | log_to: Input should be
log_to=3 | log_to: Input should be
method=dpaa | did you mean 'dpa'
method=3 | method
llm_name_or_path=3 | llm_name_or_path: Input should be a valid string
family=qwen | 'qwen' is not a known family
family=3 | family
visual_encoder_name_or_path=3 | visual_encoder_name_or_path
visual_encoder_name_or_path=None | visual_encoder_name_or_path
encoder=clpi | did you mean 'clip'
encoder=3 | encoder: Input should be a valid dictionary
encoder.layr=3 | did you mean 'layer'
encoder.layer=two | layer: expected int | None (got 'two')
encoder.layer=True | layer: expected int | None (got True)
encoder.layer=99 | feature layer 99
projector=mlpp | did you mean 'mlp'
projector.depth=two | depth: expected int (got 'two')
projector.depth=0 | projector.depth=0 is not a whole number above 0
projector.depth=-1 | projector.depth=-1
projector.depth=True | depth: expected int (got True)
projector.depth=1.5 | depth: expected int (got 1.5)
projector.dept=2 | did you mean 'depth'
projector.type=resampler projector.queries=0 | projector.queries=0
projector.type=resampler projector.queries=x | queries: expected int (got 'x')
projector.type=avg_pool projector.factor=0 | projector.factor=0
projector.type=pixel_shuffle projector.factor=x | factor: expected int (got 'x')
max_tiles=0 | max_tiles: Input should be greater than or equal
max_tiles=True | max_tiles: Input should be a valid integer
max_tiles=x | max_tiles
max_tiles=1.5 | max_tiles
captions=3 | captions
captions.data_path=3 | captions.data_path
captions.data_path=nowhere.json | which stage proxy reads, does not exist
captions.image_folder=3 | captions.image_folder
captions.image_folder=nowhere | captions.image_folder='nowhere'
captions.held_out=-1 | captions.held_out
captions.held_out=True | captions.held_out: Input should be a valid integer
captions.held_out=x | captions.held_out
captions.share=0 | captions.share: Input should be greater than 0
captions.share=2 | captions.share: Input should be less than or equal to 1
captions.share=True | captions.share: Input should be a valid number
captions.share=nan | captions.share
captions.skip_limit=2 | captions.skip_limit
captions.skip_limit=-1 | captions.skip_limit
captions.weights=[1,2] | weights has 2 values
captions.special_tokens=tokens | captions.special_tokens
captions.num_proc=0 | captions.num_proc
captions.weights=[0] | Input should be greater than 0
captions.weights=x | captions.weights
captions.heldout=1 | did you mean 'held_out'
instructions=None | instructions
instructions.data_path=nowhere.json | which stage tune reads, does not exist
instructions.held_out=3 | instructions.held_out: not a setting
instructions.skip_limits=0 | did you mean 'skip_limit'
proxy=3 | proxy
proxy=None | needs its stage proxy
proxy.lr=True | proxy.lr: Input should be a valid number (got True)
proxy.lr=x | proxy.lr: Input should be a valid number
proxy.lr=nan | proxy.lr
proxy.lr=-1 | proxy.lr: Input should be greater than 0
proxy.lr=None | proxy.lr
align.lr=inf | align.lr: Input should be a finite number
align.lrr=1 | did you mean 'lr'
align.batch_size=0 | align.batch_size
align.batch_size=True | align.batch_size: Input should be a valid integer
align.batch_size=many | align.batch_size
align.batch_size=1.5 | align.batch_size
align.batch_size=3 | not a multiple of align.batch_size=3
align.global_batch_size=0 | align.global_batch_size
align.global_batch_size=None | align.global_batch_size
align.max_epochs=0 | align.max_epochs
align.max_epochs=True | align.max_epochs
align.max_epochs=0.5 | align.max_epochs
align.max_steps=0 | align.max_steps
align.max_steps=True | align.max_steps
align.max_length=1 | align.max_length
align.max_length=x | align.max_length
align.pad_image_to_square=3 | align.pad_image_to_square: Input should be a valid b
align.background=whitish | 'whitish' is no colour
align.pad_image_to_square=no | align.pad_image_to_square: Input should be a valid b
align.warmup_ratio=1 | align.warmup_ratio
align.warmup_ratio=True | align.warmup_ratio
align.warmup_ratio=nan | align.warmup_ratio
align.save_steps=0 | align.save_steps
align.save_steps=True | align.save_steps
align.normalize=globl | align.normalize
align.normalize=True | align.normalize
align.contrast_cache=3 | align.contrast_cache
align.loss=cmoo | did you mean 'cmo'
align.loss=3 | align.loss
align.loss.windw=5 | did you mean 'window'
align.loss.window=2 | window=2: expected an odd whole number
align.loss.window=True | window: expected int (got True)
align.loss.d_min=x | d_min: expected float (got 'x')
align.loss.d_min=True | d_min: expected float (got True)
align.loss.d_max=inf | d_max=inf
align.loss.boundary=flt | did you mean 'flat'
tune.start_from=proxi | tune.start_from
tune.train_llm=qlora | tune.train_llm
tune.train_llm=True | tune.train_llm
tune.projector_lr=0 | tune.projector_lr: Input should be greater than 0
tune.projector_lr=True | tune.projector_lr
tune.projector_lr=x | tune.projector_lr
tune.projektor_lr=1 | did you mean 'projector_lr'
tune.train_visual_encoder=1 | tune.train_visual_encoder
tune.visual_encoder_lr=0 | tune.visual_encoder_lr
tune.lora=3 | tune.lora
tune.lora.r=0 | tune.lora.r
tune.lora.r=True | tune.lora.r
tune.lora.r=1.5 | tune.lora.r
tune.lora.lora_alpha=-1 | tune.lora.lora_alpha
tune.lora.lora_alpha=True | tune.lora.lora_alpha
tune.lora.lora_dropout=1 | tune.lora.lora_dropout
tune.lora.lora_dropout=False | tune.lora.lora_dropout
tune.lora.lora_alfa=1 | did you mean 'lora_alpha'
prompt_template=internlm2_chatt | internlm2_chat
prompt_template=3 | prompt_template
tokenizer=3 | tokenizer: expected a dict (got 3)
tokenizer.paddng_side=left | did you mean 'padding_side'
tokenizer.padding_side=middle | adding side
tokenizer.trust_remote_code=no | tokenizer.trust_remote_code: expected True or False
tokenizer.trust_remote_cod=True | did you mean 'trust_remote_code'
tokenizer.model_max_lenght=3 | did you mean 'model_max_length'
tokenizer.type=transformers.AutoTokeniser.x | tokenizer.type='transformers.AutoTokeniser.x' can't be
tokenizer.pretrained_model_name_or_path=x | set llm_name_or_path
image_processor=3 | image_processor: expected a dict (got 3)
image_processor.siz=3 | did you mean 'size'
image_processor.do_resiz=False | did you mean 'do_resize'
image_processor.do_resize=no | image_processor.do_resize: expected bool
image_processor.rescale_factor=x | image_processor.rescale_factor: expected
image_processor.type=transformers.CLIPImageP.x | can't be imported
model=3 | model: expected
model.llm=3 | model.llm: expected a dict (got 3)
model.llm.torch_dtyp=1 | did you mean 'torch_dtype'
model.llm.torch_dtype=torch.bfloat17 | set precision instead
model.llm.torch_dtype=3 | set precision instead
model.llm.attn_implementation=sdpaa | did you mean 'sdpa'
model.llm.trust_remote_code=no | model.llm.trust_remote_code: expected True or False
model.llm.low_cpu_mem_usag=True | did you mean 'low_cpu_mem_usage'
model.llm.type=transformers.LlamaForCausalL.x | is not the from_pretrained of an importable
model.llm.pretrained_model_name_or_path=x | set llm_name_or_path
model.visual_encoder=3 | model.visual_encoder: expected a dict (got 3)
model.visual_encoder.torch_dtyp=1 | did you mean 'torch_dtype'
model.visual_encoder.torch_dtype=bf15 | set precision instead
model.visual_encoder.attn_implementation=x | model.visual_encoder.attn_implementation='x'
model.use_activation_checkpoint=True | did you mean 'use_activation_checkpointing'
model.use_activation_checkpointing=yes | use_activation_checkpointing: expected bool
model.visual_select_layer=x | visual_select_layer: expected int | None (got 'x')
model.projector_depth=3 | set projector.depth instead
model.type=LLaVAModel | model.type: each stage sets it
model.freeze_llm=True | model.freeze_llm: each stage sets it
model.llm_lora.r=3 | model.llm_lora: each stage sets it
model.normalize=global | set <stage>.normalize instead
model.loss=cmo | set <stage>.loss instead
train_dataloader=3 | train_dataloader: expected
train_dataloader.num_worker=3 | did you mean 'num_workers'
train_dataloader.num_workers=-1 | train_dataloader: num_workers
train_dataloader.num_workers=x | train_dataloader.num_workers: expected int (got 'x')
train_dataloader.num_workers=True | train_dataloader.num_workers: expected int (got True)
train_dataloader.num_workers=1.5 | train_dataloader.num_workers: expected int (got 1.5)
train_dataloader.pin_memory=3 | train_dataloader.pin_memory: expected bool (got 3)
train_dataloader.pin_memory=yes | train_dataloader.pin_memory: expected bool
train_dataloader.prefetch_factor=-1 | train_dataloader: prefetch_factor
train_dataloader.prefetch_factor=x | train_dataloader.prefetch_factor: expected int
train_dataloader.persistent_workers=True | train_dataloader: persistent_workers
train_dataloader.timeout=-1 | train_dataloader: timeout
train_dataloader.timeout=x | train_dataloader.timeout: expected float
train_dataloader.multiprocessing_context=x | train_dataloader: multiprocessing_context
train_dataloader.shuffle=True | train_dataloader: sampler option is mutually exclusive
train_dataloader.batch_size=3 | set <stage>.batch_size instead
train_dataloader.drop_last=True | train_dataloader.drop_last: each stage sets it
train_dataloader.num_batch_per_epoch=3 | set <stage>.max_steps instead
train_dataloader.batch_sampler.type=x | train_dataloader.batch_sampler: each stage sets it
train_dataloader.dataset.type=x | set captions or instructions instead
train_dataloader.sampler.type=x | set <stage>.global_batch_size instead
train_dataloader.collate_fn.type=x | train_dataloader.collate_fn: each stage sets it
train_cfg.max_iters=3 | set <stage>.max_epochs or <stage>.max_steps instead
train_cfg=3 | set <stage>.max_epochs or <stage>.max_steps instead
param_scheduler=3 | param_scheduler
param_scheduler.type=LinearLR | param_scheduler: each stage sets it
optim_wrapper=3 | optim_wrapper: expected
optim_wrapper.type=Foo | set precision instead
optim_wrapper.type=Bf16OptimWraper | set precision instead
optim_wrapper.accumulative_counts=2 | set <stage>.global_batch_size instead
optim_wrapper.clip_grads=3 | did you mean 'clip_grad'
optim_wrapper.clip_grad=3 | optim_wrapper.clip_grad: expected
optim_wrapper.clip_grad.max_norn=1 | did you mean 'max_norm'
optim_wrapper.clip_grad.max_norm=x | optim_wrapper.clip_grad.max_norm: expected float
optim_wrapper.clip_grad.max_norm=True | optim_wrapper.clip_grad.max_norm: expected float
optim_wrapper.clip_grad.max_norm=0 | optim_wrapper.clip_grad.max_norm: expected a number ab
optim_wrapper.clip_grad.max_norm=-1 | optim_wrapper.clip_grad.max_norm: expected a number ab
optim_wrapper.clip_grad.max_norm=nan | optim_wrapper.clip_grad.max_norm
optim_wrapper.clip_grad.error_if_nonfinite=3 | error_if_nonfinite: expected bool
optim_wrapper.clip_grad.type=valu | did you mean 'value'
optim_wrapper.optimizer=AdamW | optim_wrapper.optimizer: expected a dict
optim_wrapper.optimizer.type=AdamWW | did you mean 'AdamW'
optim_wrapper.optimizer.type=3 | optim_wrapper.optimizer.type: 3 is not a known
optim_wrapper.optimizer.lr=1 | set <stage>.lr instead
optim_wrapper.optimizer.beta=1 | did you mean 'betas'
optim_wrapper.optimizer.betas=0.9 | optim_wrapper.optimizer.betas: expected tuple
optim_wrapper.optimizer.betas=(0.9,1.1) | optim_wrapper.optimizer: Invalid beta parameter
optim_wrapper.optimizer.betas=(x,y) | optim_wrapper.optimizer.betas: expected tuple
optim_wrapper.optimizer.weight_decay=-1 | optim_wrapper.optimizer: Invalid weight_decay
optim_wrapper.optimizer.weight_decay=x | optim_wrapper.optimizer.weight_decay: expected float
optim_wrapper.optimizer.weight_decay=True | optim_wrapper.optimizer.weight_decay: expected float
optim_wrapper.optimizer.weight_decay=inf | optim_wrapper.optimizer.weight_decay: not a number to
optim_wrapper.optimizer.eps=nan | optim_wrapper.optimizer.eps: not a number to
optim_wrapper.optimizer.amsgrad=3 | optim_wrapper.optimizer.amsgrad: expected bool
optim_wrapper.constructor=Foo | optim_wrapper.constructor: not a known
optim_wrapper.constructor=3 | optim_wrapper.constructor: not a known
optim_wrapper.paramwise_cfg=3 | optim_wrapper.paramwise_cfg: expected a dict
optim_wrapper.paramwise_cfg.norm_decay_mul=0 | did you mean 'norm_decay_mult'
optim_wrapper.paramwise_cfg.norm_decay_mult=x | norm_decay_mult: expected a number
optim_wrapper.paramwise_cfg.bias_lr_mult=-1 | bias_lr_mult: expected a number
optim_wrapper.paramwise_cfg.custom_keys=3 | custom_keys: expected a dict
optim_wrapper.paramwise_cfg.custom_keys.llm=3 | custom_keys.llm: expected a dict
optim_wrapper.paramwise_cfg.custom_keys.llm.lr_mul=1 | did you mean 'lr_mult'
optim_wrapper.paramwise_cfg.custom_keys.llm.lr_mult=x | lr_mult: expected a number
default_hooks=3 | default_hooks: expected
default_hooks.logger=3 | default_hooks.logger: expected a dict
default_hooks.foo.type=FooHook | default_hooks.foo.type: 'FooHook' is not a known hook
default_hooks.loger.interval=1 | default_hooks.loger.type: it is missing
default_hooks.logger.type=LoggerHok | did you mean 'LoggerHook'
default_hooks.logger.interval=0 | default_hooks.logger: interval must be greater than 0
default_hooks.logger.interval=-1 | default_hooks.logger: interval must be greater than 0
default_hooks.logger.interval=x | default_hooks.logger.interval: expected int (got 'x')
default_hooks.logger.interval=True | default_hooks.logger.interval: expected int (got True)
default_hooks.logger.intervall=1 | did you mean 'interval'
default_hooks.logger.log_metric_by_epoch=3 | log_metric_by_epoch: each stage sets it
default_hooks.logger.priority=HIGHH | default_hooks.logger.priority
default_hooks.logger.priority=101 | default_hooks.logger.priority
default_hooks.checkpoint=None | default_hooks.checkpoint: expected a dict (got None)
default_hooks.checkpoint.interval=5 | set <stage>.save_steps instead
default_hooks.checkpoint.max_keep_ckpts=1 | at least 2
default_hooks.checkpoint.max_keep_ckpts=x | default_hooks.checkpoint.max_keep_ckpts: expected int
default_hooks.checkpoint.save_lasst=True | did you mean 'save_last'
default_hooks.checkpoint.save_last=yes | default_hooks.checkpoint.save_last: expected bool
default_hooks.checkpoint.by_epoch=True | default_hooks.checkpoint.by_epoch
default_hooks.timer.interval=1 | default_hooks.timer.interval: not a known key
custom_hooks=3 | custom_hooks: expected
custom_hooks=[3] | custom_hooks: expected
custom_hooks.type=EMAHook | custom_hooks: expected
val_cfg=1 | val_cfg: expected
val_cfg.type=ValLoop | val_cfg: it goes together with val_dataloader, val_evaluator
test_dataloader.batch_size=1 | it goes together with test_cfg, test_evaluator
val_evaluator=x | it goes together with val_dataloader, val_cfg
auto_scale_lr.base_batch_size=3 | set <stage>.lr instead
data_preprocessor.type=x | data_preprocessor: each stage sets it
env_cfg=3 | env_cfg: expected
env_cfg.cudnn_benchmrk=True | did you mean 'cudnn_benchmark'
env_cfg.cudnn_benchmark=3 | env_cfg.cudnn_benchmark: expected bool (got 3)
env_cfg.mp_cfg=3 | env_cfg.mp_cfg: expected
env_cfg.mp_cfg.mp_start_metod=fork | did you mean 'mp_start_method'
env_cfg.mp_cfg.mp_start_method=frk | did you mean 'fork'
env_cfg.mp_cfg.opencv_num_threads=x | env_cfg.mp_cfg.opencv_num_threads: expected int
env_cfg.dist_cfg=3 | env_cfg.dist_cfg: expected a dict (got 3)
env_cfg.dist_cfg.backend=ncl | did you mean 'nccl'
env_cfg.dist_cfg.backnd=nccl | did you mean 'backend'
env_cfg.resource_limit=x | env_cfg.resource_limit: expected int
visualizer=3 | visualizer: expected
visualizer.type=Visualiser | did you mean 'Visualizer'
visualizer.vis_backend=[] | did you mean 'vis_backends'
visualizer.vis_backends=3 | visualizer.vis_backends: expected
visualizer.vis_backends.0.type=LocalVisBackned | did you mean 'LocalVisBackend'
visualizer.vis_backends.0.save_dirs=x | did you mean 'save_dir'
log_level=LOUD | log_level: expected CRITICAL
log_level=3 | log_level: expected str (got 3)
log_level=INFOO | did you mean 'INFO'
log_processor=3 | log_processor: expected
log_processor.window_siz=3 | did you mean 'window_size'
log_processor.window_size=x | log_processor.window_size: expected int | float
log_processor.window_size=0 | log_processor.window_size
log_processor.by_epoch=True | log_processor.by_epoch
log_processor.mean_pattern=3 | log_processor.mean_pattern: expected str
log_processor.mean_pattern=( | log_processor: missing )
log_processor.custom_cfg=3 | log_processor.custom_cfg
log_processor.type=LogProcesor | did you mean 'LogProcessor'
load_from=x.pth | load_from: the stages hand over by themselves
load_from=3 | load_from: expected
resume=yes | resume: expected bool (got 'yes')
resume=3 | resume: expected bool (got 3)
launcher=3 | launcher: expected str (got 3)
experiment_name=3 | experiment_name: expected
default_scope=3 | default_scope: expected
work_dir=3 | work_dir: expected
randomness=3 | randomness: expected
randomness.sed=1 | did you mean 'seed'
randomness.seed=x | randomness.seed: expected a number from 0 on
randomness.seed=None | randomness.seed: expected a number from 0 on
randomness.seed=True | randomness.seed: expected a number from 0 on
randomness.seed=1.5 | randomness.seed: expected a number from 0 on
randomness.seed=-1 | randomness.seed: expected a number from 0 on
randomness.deterministic=yes | randomness.deterministic: expected bool
randomness.diff_rank_seed=3 | randomness.diff_rank_seed: expected bool
strategy.type=DeepSpeedStrategy | strategy: give --deepspeed
custom_imports=3 | custom_imports: expected a dict
compile=True | compile: not a known key
optimizer.type=AdamW | optimizer: not a known key
hooks=[] | hooks: not a known key
lr=1 | lr: not a known key
""".strip().splitlines()
RIGHT = """
align.max_steps=1e1
align.lr=1
captions.data_path=('{captions}',) captions.image_folder=['{images}']
tokenizer.use_fast=True
tokenizer.revision=main tokenizer.cache_dir=x tokenizer.subfolder=''
tokenizer.model_max_length=32 tokenizer.pad_token='<unk>'
tokenizer.clean_up_tokenization_spaces=False
image_processor.do_resize=True image_processor.resample=3
image_processor.size.shortest_edge=28
model.llm.attn_implementation=sdpa model.llm.low_cpu_mem_usage=True model.llm.revision=main
model.llm.rms_norm_eps=1e-5 model.llm.attention_dropout=0.1
model.use_activation_checkpointing=False
train_dataloader.num_workers=2 train_dataloader.prefetch_factor=4
train_dataloader.persistent_workers=True train_dataloader.num_workers=2
optim_wrapper.clip_grad=None
optim_wrapper.clip_grad.max_norm=inf
optim_wrapper.clip_grad.norm_type=1.0
optim_wrapper.optimizer.betas=[0.9,0.95] optim_wrapper.optimizer.weight_decay=0.1
optim_wrapper.optimizer.fused=None
optim_wrapper.paramwise_cfg.custom_keys.projector.lr_mult=0.1
optim_wrapper.constructor=DefaultOptimWrapperConstructor
default_hooks.logger.interval=1 default_hooks.logger.priority=LOW
default_hooks.timer=None
default_hooks.ema.type=EMAHook
default_hooks.checkpoint.max_keep_ckpts=-1
custom_hooks=[]
env_cfg.mp_cfg.mp_start_method=spawn env_cfg.resource_limit=1024
env_cfg.dist_cfg.timeout=1800
visualizer.vis_backends.0.type=TensorboardVisBackend
log_level=WARNING
log_processor.window_size=5
randomness.deterministic=True
experiment_name=x
""".strip().splitlines()


@pytest.fixture(scope="module")
def base(tiny) -> Config:
    return Config.fromfile(harness.TINY_CONFIG)


def check(base: Config, options: str) -> None:
    """What every start looks at before it reads data, with these --cfg-options."""
    cfg = copy.deepcopy(base)
    pairs = (option.split("=", 1) for option in options.split())
    cfg.merge_from_dict({key: DictAction._parse_iterable(value) for key, value in pairs})
    cfg.setdefault("work_dir", "run")
    cfg.setdefault("launcher", "none")
    run = Run.of(cfg, Precision("bf16"))
    with DefaultScope.overwrite_default_scope("mmengine"):
        check_ahead(run, list(run.stages.values()))


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.split(" | ")[0])
def test_what_is_wrong_is_one_line(case, base):
    options, message = case.split(" | ", 1)
    with pytest.raises(DPAError) as error:
        check(base, options)
    lines = str(error.value).splitlines()
    assert message in str(error.value), str(error.value)
    assert len(lines) <= 2, str(error.value)  # where, and what


@pytest.mark.parametrize("options", RIGHT)
def test_what_is_right_passes(options, base, tiny):
    places = {"captions": tiny / "captions.json", "images": tiny / "images"}
    check(base, options.format(**places))


def test_the_package_of_log_to_is_looked_for_before_the_first_stage(base, monkeypatch):
    monkeypatch.setattr("dpa_xtuner.stages.build.find_spec", lambda name: None)
    with pytest.raises(DPAError, match="log_to='wandb' needs a package: pip install wandb"):
        check(base, "log_to=wandb")
    monkeypatch.setattr("dpa_xtuner.stages.build.find_spec", lambda name: name)
    check(base, "log_to=wandb")


@pytest.mark.parametrize("log_to", [None, "tensorboard", "swanlab"])
def test_log_to_adds_to_the_runs_own_folder(log_to, base, tiny, tmp_path):
    cfg = copy.deepcopy(base)
    cfg.merge_from_dict({"log_to": log_to, "work_dir": str(tmp_path / "run"), "launcher": "none"})
    run = Run.of(cfg, Precision("bf16"))
    with DefaultScope.overwrite_default_scope("mmengine"):
        config = stage_config(run, run.stages["proxy"], {"data": {"sha256": ""}, "loads": {}})
    added = {
        None: [],
        "tensorboard": [{"type": "TensorboardVisBackend"}],
        "swanlab": [
            {
                "type": "swanlab.integration.mmengine.SwanlabVisBackend",
                "init_kwargs": {"project": "dpa_xtuner", "experiment_name": "run/proxy"},
            }
        ],
    }[log_to]
    assert config.visualizer.vis_backends == [{"type": "LocalVisBackend"}, *added]
