"""BASEGQLAForCausalLM for transformers: MLA whose heads share keys and values in groups.

Written by `gqla convert`. kv_b_proj has one block of K and V a group (num_key_value_heads groups), which the heads of the
group use; everything else is transformers' own BASE model.
"""
from torch import nn
from transformers.models.MODULE import modeling_MODULE as base


class GroupedUpProjection(nn.Linear):
    """kv_b_proj of G groups that answers with a block for each of the h heads, head by head."""

    def __init__(self, config):
        width = config.qk_nope_head_dim + config.v_head_dim
        super().__init__(config.kv_lora_rank, config.num_key_value_heads * width, bias=False)
        self.width = width
        self.heads_per_group = config.num_attention_heads // config.num_key_value_heads

    def forward(self, latent):
        blocks = super().forward(latent).unflatten(-1, (-1, self.width))
        return blocks.repeat_interleave(self.heads_per_group, dim=-2).flatten(-2)


class BASEGQLAForCausalLM(base.BASEForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            attention = layer.self_attn
            attention.kv_b_proj = GroupedUpProjection(config)
            # Every head has keys and values of its own once they are repeated.
            attention.num_key_value_groups = 1
        self.post_init()
