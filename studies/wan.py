"""Question: can a model that was not written for it be sampled on many ranks?

Run:    pip install diffusers && python studies/wan.py               # one rank
        torchrun --nproc_per_node 4 studies/wan.py --cfg 2 --ulysses 2      # the same on four
Time:   20 seconds on 2 cores
Answer: yes. Thirty lines give diffusers' Wan the methods that sample_parallel.py asks for, in
        fp32 or as `from_pretrained` loads it in bf16.

The script gives a small Wan with random weights to ParallelSampler, and compares with an Euler loop
around Wan's own forward. With a real checkpoint:

    model = wan.WanTransformer3DModel.from_pretrained(...)
    text = model.condition_embedder.text_embedder(umt5_features)        # (B, L, D), once
"""
import os

import common
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange

from sample_parallel import ParallelSampler, check_degrees, make_mesh
from text_cond import make_torchvision_importable

make_torchvision_importable()
from diffusers.models.transformers import transformer_wan as wan  # noqa: E402

own = wan.dispatch_attention_fn             # all of Wan's attention asks here for a backend:
wan.dispatch_attention_fn = lambda *qkv, backend=None, **how: (     # a callable one is ours
    backend(*(a.transpose(1, 2) for a in qkv)).transpose(1, 2) if callable(backend)
    else own(*qkv, backend=backend, **how))


class Seams(wan.WanTransformer3DModel):
    """Wan with the seams of sample_parallel.py; its patches are all (1, 2, 2)."""

    def patchify(self, x):
        return rearrange(x, "B C T (H q) (W r) -> B (T H W) (q r C)", q=2, r=2)

    def unpatchify(self, x, shape):
        return rearrange(x, "B (T H W) (q r C) -> B C T (H q) (W r)", q=2, r=2, T=shape[2],
                         H=shape[3] // 2)

    def positions(self, shape):
        return torch.cat(self.rope(torch.empty(shape)), -1)[0, :, 0]

    def condition(self, t):                         # Wan's clock: 1000 is noise, 0 is data
        return self.condition_embedder(
            1000 * (1 - t), self.proj_out.weight.new_zeros(1, 1, self.config.text_dim))[:2]

    def embed(self, x):
        w = self.patch_embedding.weight.permute(0, 2, 3, 4, 1).flatten(1)
        return F.linear(x.to(w.dtype), w, self.patch_embedding.bias)

    def head(self, h, c):
        shift, scale = (self.scale_shift_table + c[0][:, None]).chunk(2, 1)
        return -self.proj_out((self.norm_out(h.float()) * (1 + scale) + shift).type_as(h))


def seams(model):
    """Give a WanTransformer3DModel the seams, and its blocks an assignable `attend`."""
    model.__class__ = Seams
    for block in model.blocks:
        block.attend = F.scaled_dot_product_attention
        block.attn1.processor._attention_backend = lambda *qkv, block=block: block.attend(*qkv)
        block.register_forward_pre_hook(lambda _, a: (              # a: h, pos, c, text, mask
            a[0], a[3], a[2][1].unflatten(1, (6, -1)), a[1][None, :, None].chunk(2, -1)))
    return model


@torch.no_grad()
def main():
    parser = common.Parser(__doc__)
    for name in ("cfg", "pp", "ring", "ulysses"):
        parser.add_argument(f"--{name}", type=common.whole, default=1)
    degrees = vars(parser.parse_args())
    try:
        check_degrees(int(os.environ.get("WORLD_SIZE", 1)), **degrees)
    except ValueError as error:
        parser.error(str(error))
    if any(n > 1 for n in degrees.values()):
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = wan.WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=16, out_channels=16, text_dim=64,
        freq_dim=64, ffn_dim=256, num_layers=4, cross_attn_norm=True).eval()
    x0, prompt = torch.randn(1, 16, 4, 16, 16), torch.randn(1, 12, 64)
    steps, guidance, x = 8, 3.0, x0
    for k in range(steps):                          # Wan's own forward, its clock, its velocity
        t = torch.full((1,), 1000 * (1 - k / steps))
        v, v0 = (-model(x, t, text, return_dict=False)[0] for text in (prompt, 0 * prompt))
        x = x + (v0 + guidance * (v - v0)) / steps
    text = model.condition_embedder.text_embedder(torch.cat([prompt, 0 * prompt]))
    sampler = ParallelSampler(seams(model), make_mesh(**degrees))
    y = sampler.sample(x0, text[:1], null=text[1:], guidance=guidance, steps=steps)
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"largest difference {(x - y).abs().max().item():.2g}, largest value "
              f"{x.abs().max().item():.2g}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
