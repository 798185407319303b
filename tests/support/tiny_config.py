# The pipeline at the smallest size: the models and data that the tests write to $DPA_TINY.
_base_ = ["../../configs/_base_/dpa.py"]

llm_name_or_path = "{{$DPA_TINY:tiny}}/llm"
visual_encoder_name_or_path = "{{$DPA_TINY:tiny}}/visual_encoder"
prompt_template = "internlm2_chat"
precision = "bf16"  # the same on every machine
captions = dict(
    data_path="{{$DPA_TINY:tiny}}/captions.json",
    image_folder="{{$DPA_TINY:tiny}}/images",
    held_out=3,
)
instructions = dict(
    data_path="{{$DPA_TINY:tiny}}/instructions.json", image_folder="{{$DPA_TINY:tiny}}/images"
)

model = dict(llm=dict(type="transformers.LlamaForCausalLM.from_pretrained"))

proxy = dict(
    lr=1e-2,
    batch_size=2,
    global_batch_size=4,
    max_steps=6,
    save_steps=2,
    warmup_ratio=0.34,
    lora=dict(r=4, lora_alpha=8),
)
align = dict(
    lr=1e-2, batch_size=2, global_batch_size=4, max_steps=6, save_steps=2, warmup_ratio=0.34
)
tune = dict(
    lr=1e-2,
    batch_size=2,
    global_batch_size=4,
    max_steps=6,
    save_steps=2,
    warmup_ratio=0.34,
    lora=dict(r=4, lora_alpha=8),
)

train_dataloader = dict(num_workers=0)
