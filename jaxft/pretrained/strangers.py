"""Recognises networks that jaxft does not have by a key, so that a message can name them."""

_IMAGE_TOWER = "save only the image tower: torch.save(model.visual.trunk.state_dict(), FILE)"
TEXT_TOWER = {
    r"(^|\.)(text_model|text_projection|token_embedding|transformer\.resblocks|logit_scale)(\.|$)|(^|\.)text\.": (
        f"it is CLIP's or SigLIP's, with an image and a text tower; if the image tower is one of timm's, {_IMAGE_TOWER}"
    ),
}
# Pattern of a key -> the network. The first one that fits is named.
STRANGERS = {
    **TEXT_TOWER,
    r"\.(absmax|nested_absmax|quant_map|SCB|weight_format|qweight|qzeros|weight_scale|weight_packed|_packed_params)$"
    r"|\.quant_state\.": "its weights are quantised; save them as floats: torch.save(model.float().state_dict(), FILE)",
    r"(^|\.)(vision_model\.encoder|visual\.class_embedding|embeddings\.class_embedding$|"
    r"layers\.\d+\.layer_norm1\.)": "it is CLIP's or SigLIP's image tower",
    r"(^|\.)(layers|stages|features)\.\d+\.(blocks\.)?\d+\.att(entio)?n\.(self\.)?(relative_|cpb_|logit_)": (
        "it is a Swin Transformer"
    ),
    r"relative_position_bias_table$|\.(q|v)_bias$": "it has relative position embeddings, as BEiT",
    r"(^|\.)blocks\.\d+\.\d+\.(conv_pw|conv_dw|conv_pwl|se)\.|\.expand_conv\.|(^|\.)_blocks\.\d+\._": (
        "it is an EfficientNet or MobileNet"
    ),
    r"(^|\.)features\.\d+\.(\d+\.block\.\d+\.\d+|block\.\d+\.\d+|conv\.\d)\.": "it is an EfficientNet or MobileNet",
    r"\.denselayer\d+\.": "it is a DenseNet",
    r"(^|\.)trunk_output\.|(^|\.)s\d\.b\d+\.conv\d\.": "it is a RegNet",
    r"(^|\.)(down_blocks|input_blocks)\.\d+\.": "it is a diffusion model's U-Net",
    r"(^|\.)(embed_tokens|lm_head|wte|word_embeddings)\.": "it is a language model",
}
