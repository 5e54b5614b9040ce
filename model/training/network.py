"""The network: BitNet b1.58 with the layout of 2B4T (sub-norms, squared ReLU, grouped queries, tied
embedding), and its optimiser (Muon on the ternary matrices, AdamW on the rest)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

BASE_CONFIG = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 512,
}


class QuantiseActivations(torch.autograd.Function):
    """Per token: absolute maximum to 127, rounded; the gradient passes straight through."""

    @staticmethod
    def forward(ctx, x):
        wide = x.float()
        scale = 127.0 / wide.abs().amax(-1, keepdim=True).clamp_(min=1e-5)
        return ((wide * scale).round_().clamp_(-128, 127) / scale).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class QuantiseWeights(torch.autograd.Function):
    """Per tensor: mean magnitude to 1, rounded to -1, 0, 1; the gradient passes straight through."""

    @staticmethod
    def forward(ctx, weight):
        scale = 1.0 / weight.abs().mean().clamp_(min=1e-5)
        return (weight * scale).round_().clamp_(-1, 1) / scale

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class RmsNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.width, self.eps = width, eps

    def forward(self, x):
        return F.rms_norm(x, (self.width,), self.weight.to(x.dtype), self.eps)


class TernaryLinear(nn.Module):
    """A matrix that computes with ternary weights. The caller quantises the input."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x):
        return F.linear(x, QuantiseWeights.apply(self.weight).to(x.dtype))


def rotate(x, cos, sin):
    """RoPE in the rotate-half form: element j is paired with j + d/2."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Block(nn.Module):
    """One layer. Modules have the names of the checkpoint."""

    def __init__(self, config):
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        eps = config["rms_norm_eps"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config["num_key_value_heads"]
        self.head_dim = hidden // self.heads
        kv_width = self.kv_heads * self.head_dim
        self.input_layernorm = RmsNorm(hidden, eps)
        self.post_attention_layernorm = RmsNorm(hidden, eps)
        self.self_attn = nn.Module()
        self.self_attn.q_proj = TernaryLinear(hidden, hidden)
        self.self_attn.k_proj = TernaryLinear(hidden, kv_width)
        self.self_attn.v_proj = TernaryLinear(hidden, kv_width)
        self.self_attn.o_proj = TernaryLinear(hidden, hidden)
        self.self_attn.attn_sub_norm = RmsNorm(hidden, eps)
        self.mlp = nn.Module()
        self.mlp.gate_proj = TernaryLinear(hidden, inner)
        self.mlp.up_proj = TernaryLinear(hidden, inner)
        self.mlp.down_proj = TernaryLinear(inner, hidden)
        self.mlp.ffn_sub_norm = RmsNorm(inner, eps)

    def forward(self, x, cos, sin):
        quantise, attention, mlp = QuantiseActivations.apply, self.self_attn, self.mlp
        batch, length, _ = x.shape

        def split(y, heads):
            return y.view(batch, length, heads, self.head_dim).transpose(1, 2)

        h = quantise(self.input_layernorm(x))
        q = rotate(split(attention.q_proj(h), self.heads), cos, sin)
        k = rotate(split(attention.k_proj(h), self.kv_heads), cos, sin)
        v = split(attention.v_proj(h), self.kv_heads)
        k = k.repeat_interleave(self.heads // self.kv_heads, 1)
        v = v.repeat_interleave(self.heads // self.kv_heads, 1)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        o = o.transpose(1, 2).reshape(batch, length, -1)
        x = x + attention.o_proj(quantise(attention.attn_sub_norm(o)))
        h = quantise(self.post_attention_layernorm(x))
        gate = F.relu(mlp.gate_proj(h))
        return x + mlp.down_proj(quantise(mlp.ffn_sub_norm(gate * gate * mlp.up_proj(h))))


def rope_tables(config):
    """Cosines and sines, [positions, head_dim]."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    inverse = 1.0 / (config["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim))
    angles = torch.outer(torch.arange(config["max_position_embeddings"]).float(), inverse)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        hidden = config["hidden_size"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], hidden)
        self.layers = nn.ModuleList(Block(config) for _ in range(config["num_hidden_layers"]))
        self.norm = RmsNorm(hidden, config["rms_norm_eps"])
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, 0, 0.02)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids, targets):
        """Mean cross-entropy of `targets` after `ids`, both [batch, length]."""
        x = self.embed_tokens(ids)
        cos, sin = (table[: ids.shape[1]].to(x.dtype) for table in (self.cos, self.sin))
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.reshape(-1))


def is_ternary(name, parameter):
    """Whether a parameter is one of the matrices that become ternary."""
    return parameter.dim() == 2 and "embed" not in name


def orthogonalise(gradient):
    """Newton-Schulz iteration of Muon, for a stack of matrices."""
    x = gradient.bfloat16() if gradient.is_cuda else gradient
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if is_tall else x).to(gradient.dtype)


class Optimiser:
    """Muon on the ternary matrices (stacked by shape), AdamW on embedding and norms."""

    def __init__(self, model, beta=0.95):
        named = list(model.named_parameters())
        self.matrices = [p for name, p in named if is_ternary(name, p)]
        rest = [p for name, p in named if not is_ternary(name, p)]
        self.adam = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.95), eps=1e-9, weight_decay=0.0)
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.beta = beta
        self.by_shape = {}
        for index, matrix in enumerate(self.matrices):
            self.by_shape.setdefault(tuple(matrix.shape), []).append(index)

    def step(self, matrix_rate, rest_rate, weight_decay):
        for group in self.adam.param_groups:
            group["lr"] = rest_rate
        self.adam.step()
        for shape, indices in self.by_shape.items():
            gradients = [self.matrices[i].grad for i in indices]
            momenta = [self.momenta[i] for i in indices]
            torch._foreach_lerp_(momenta, gradients, 1 - self.beta)
            updates = torch._foreach_lerp(gradients, momenta, self.beta)
            directions = orthogonalise(torch.stack(updates))
            scale = 0.2 * math.sqrt(max(shape))
            for direction, i in zip(directions, indices):
                data = self.matrices[i].data
                data.mul_(1 - matrix_rate * weight_decay).add_(
                    direction, alpha=-matrix_rate * scale
                )

    def zero(self):
        for matrix in self.matrices:
            matrix.grad = None
        self.adam.zero_grad(set_to_none=True)
