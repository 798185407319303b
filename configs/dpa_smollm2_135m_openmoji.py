# The demo (make demo): a real 135M language model and drawings, on two CPU cores.
# `python -m dpa_xtuner.demo prepare` makes the models and the data. All numbers are [ours], chosen for
# what is learned in a quarter of an hour. Batches are small: as many samples in half as many steps
# taught less.
_base_ = ['_base_/dpa.py']

__data = '{{$DPA_DATA:data}}'
llm_name_or_path = f'{__data}/models/smollm2-135m-instruct'
visual_encoder_name_or_path = f'{__data}/models/openmoji-vit'
family = 'smollm2'
# Without the system prompt of SmolLM2's own template, which would be longer than the questions.
# A template of fewer tokens makes a step a fifth faster, but takes more steps to learn.
prompt_template = 'qwen_chat'
tokenizer = dict(chat_template='')

captions = dict(
    data_path=f'{__data}/openmoji/captions.json',
    image_folder=f'{__data}/openmoji',
    held_out=16)
instructions = dict(
    data_path=f'{__data}/openmoji/questions.json',
    image_folder=f'{__data}/openmoji')

proxy = dict(
    lr=5e-4, batch_size=8, global_batch_size=8, max_length=256, max_steps=12,
    lora=dict(r=64, lora_alpha=128))
align = dict(lr=6e-4, batch_size=8, global_batch_size=8, max_length=256, max_steps=10)
tune = dict(
    lr=8e-4, batch_size=4, global_batch_size=4, max_length=256, max_steps=200, save_steps=100,
    warmup_ratio=0.05, train_llm='lora', lora=dict(r=32, lora_alpha=64),
    # With the paper's 0.05, tokens that the picture already helps to predict outweigh the others
    # tenfold, and a run this short learns less of the others.
    loss=dict(d_min=0.25))

# With AdamW's default of 0.999, so short a run remembers the large gradients of its first steps to
# the end.
optim_wrapper = dict(optimizer=dict(betas=(0.9, 0.98)))

# On a CPU, eager attention is faster, and memory is no concern.
model = dict(llm=dict(attn_implementation='eager'), use_activation_checkpointing=False)
train_dataloader = dict(num_workers=1, pin_memory=False)
