# The pipeline of studies/openmoji: the demo's, with the methods' own bounds of the weights. Data and
# budget are set on the command line.
_base_ = ['../../configs/dpa_smollm2_135m_openmoji.py']
# Nothing is resumed in the middle of a stage that takes a minute or two.
proxy = dict(save_steps=100000)
align = dict(save_steps=100000)
tune = dict(save_steps=100000, loss=dict(_delete_=True))
default_hooks = dict(checkpoint=dict(interval=-1, save_last=False))
# Without a first token (<|im_start|>), a caption begins with its image. In one trial, `align` then
# stayed above its floor, and with it came below (studies/README.md).
tokenizer = dict(add_bos_token=True)
# A cell of a scene is a token, as are 2 x 2 of the encoder's 6 x 6 patches.
projector = dict(type='avg_pool', factor=2)
