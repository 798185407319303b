# The base of all configs of Decoupled Proxy Alignment. A config names its models and its data, and
# overrides what differs. Any value can be set on the command line, e.g.
#   xtuner train configs/dpa_internlm2_7b.py --cfg-options align.lr=1e-3
#
# Sources: [paper] arXiv 2509.14735; [xtuner] XTuner 0.2.0's LLaVA configs; [ours].

custom_imports = dict(imports=['dpa_xtuner.plugin'], allow_failed_imports=False)
# In this scope, the runner of that name runs the stages proxy, align and tune.
_scope_ = 'dpa_xtuner'
runner_type = 'Runner'

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
# The stages, and their loss [paper]:
#   vanilla  align, tune         plain cross entropy
#   pmo      proxy, align, tune  plain cross entropy
#   cmo      align, tune         weighted by p(with picture) - p(without)
#   dpa      proxy, align, tune  as cmo
#   cal      align, tune         weighted by the difference of the logits
method = 'dpa'

# The precision of all stages [ours]: frozen weights are stored in it, trained ones in float32.
#   auto  bf16 where the device computes it natively, fp16 (with dynamic loss scaling) on
#         other GPUs (T4, V100), fp32 on other CPUs
#   bf16, fp16, fp32
precision = 'auto'

# Where the figures are logged besides the run's own folder [ours]: tensorboard, wandb, swanlab.
log_to = None

# The LLM. A config names it, and its family: loader, chat template, tokenizer, LoRA layers.
# Another size is another name: --cfg-options llm_name_or_path=Qwen/Qwen3-14B.
# prompt_template (one of XTuner's names, or a dict with its keys) sets another chat template.
#   llm_name_or_path = 'Qwen/Qwen2.5-7B-Instruct'
#   family = 'qwen2_5'

visual_encoder_name_or_path = 'openai/clip-vit-large-patch14-336'  # [paper]
# clip, siglip, siglip2, dinov2, dinov3, internvit, mmpretrain, or pair (with first= and second=)
encoder = dict(type='clip')  # [paper]
# mlp (depth), pixel_shuffle (factor), avg_pool (factor), resampler (queries)
projector = dict(type='mlp')  # [paper]
# Above 1: cut an image into at most so many tiles of the encoder's size, plus a thumbnail.
max_tiles = 1

# Data: files or folders of any format in docs/data.md. proxy reads the text of `captions`, align
# the same captions with their images, tune the `instructions`. share=0.25 uses a quarter of the
# data. A list of files, with a list of image folders, is a mixture; weights=[2, 1] sets its ratio.
__data = '{{$DPA_DATA:data}}'  # with two underscores it is no setting
captions = dict(
    data_path=f'{__data}/captions.json',
    image_folder=f'{__data}/images',
    held_out=256)  # [ours] kept out of training, to measure the floor
instructions = dict(
    data_path=f'{__data}/instructions.json',
    image_folder=f'{__data}/images')

proxy = dict(
    lr=4e-5,  # [paper]
    batch_size=8,  # per device [ours]
    global_batch_size=256,  # [paper]
    max_epochs=1,  # [paper]
    max_steps=None,
    max_length=8192,  # [paper]
    pad_image_to_square=True,
    warmup_ratio=0.03,  # [paper]
    save_steps=200,  # optimizer steps between checkpoints [ours]
    # Divide the loss by the weights of the whole optimizer step, over all ranks and micro-batches
    # [ours]. 'micro_batch': by those of each micro-batch, as stock XTuner; then short answers in
    # sorted batches weigh more.
    normalize='global',
    train_llm='lora',  # [paper]; 'full' trains a whole LLM as proxy
    lora=dict(r=256, lora_alpha=512, lora_dropout=0.0))  # [paper]

align = dict(
    lr=2e-3,  # [paper]
    batch_size=8,
    global_batch_size=256,  # [paper]
    max_epochs=1,  # [paper]
    max_steps=None,
    max_length=8192,  # [paper]
    pad_image_to_square=True,
    warmup_ratio=0.03,  # [paper]
    save_steps=200,
    normalize='global',
    # Empty: the method's loss. align.loss=uniform (or cmo, cal) sets it for this stage,
    # align.loss.d_min=0 (d_max, window, boundary) changes one argument.
    loss=dict(),
    contrast_cache=None)  # a folder, useful if several epochs or runs share the same proxy

tune = dict(
    start_from='target',  # [paper]; 'proxy' starts from the proxy LLM
    # The folder of a projector of an earlier run: then the run is this stage alone, to tune a
    # finished model on further data. llm_name_or_path must be the LLM that belongs to it.
    init_projector=None,
    train_llm='full',  # [paper]; 'lora' trains an adapter
    lr=4e-5,  # [paper]
    projector_lr=None,  # of the projector (LLaVA's mm_projector_lr); None: lr
    train_visual_encoder=False,  # True trains the visual encoder too, as LLaVA-NeXT and InternVL
    visual_encoder_lr=None,  # of the encoder (LLaVA-NeXT's mm_vision_tower_lr, 2e-6); None: lr
    batch_size=4,
    global_batch_size=256,  # [paper]
    max_epochs=1,  # [paper]
    max_steps=None,
    max_length=2048,  # [paper]
    pad_image_to_square=True,  # [paper]
    warmup_ratio=0.03,  # [paper]
    save_steps=200,
    normalize='global',
    loss=dict(),  # as in align
    lora=dict(r=256, lora_alpha=512, lora_dropout=0.0))  # used if train_llm='lora' [ours]

#######################################################################
#            PART 2  Model & Tokenizer & Image Processor              #
#######################################################################
# family and encoder choose the loaders; type= overrides them.
tokenizer = dict(trust_remote_code=False, padding_side='right')

image_processor = dict()

model = dict(
    llm=dict(trust_remote_code=False),
    visual_encoder=dict(),
    use_activation_checkpointing=True)  # [paper]

#######################################################################
#                      PART 3  Dataset & Dataloader                   #
#######################################################################
train_dataloader = dict(
    batch_size=1,  # the stages set it
    num_workers=4,
    pin_memory=True)

#######################################################################
#                    PART 4  Scheduler & Optimizer                    #
#######################################################################
# A weight_decay above 0 does not apply to norms and biases, as in LLaVA, unless paramwise_cfg or
# your own constructor says otherwise.
optim_wrapper = dict(
    type='OptimWrapper',  # the stages set it, by precision
    optimizer=dict(type='AdamW', lr=0.0, betas=(0.9, 0.999), weight_decay=0.0),  # [paper]
    clip_grad=dict(max_norm=1.0, error_if_nonfinite=False))  # [xtuner]

#######################################################################
#                           PART 5  Runtime                           #
#######################################################################
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', log_metric_by_epoch=False, interval=10),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='CheckpointHook', by_epoch=False, interval=-1, save_last=True, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'))

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'))

visualizer = dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')])
log_level = 'INFO'
log_processor = dict(  # averages these over the logging interval; others show the last value
    by_epoch=False,
    mean_pattern=r'.*(loss|time|data_time|grad_norm|cross_entropy|mean_|share_|tokens).*')
load_from = None
resume = False
# A number, since a resumed run must draw the same samples.
randomness = dict(seed=42, deterministic=False)
