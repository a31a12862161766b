"""The paper's formulas, slow and plain, in float32, on the tensors of a published checkpoint under their own names.

It shares no code with the model, so that converter and tests can hold the two against each other: `--verify` of the
converter runs it, which is why it is part of the package. One picture, one text, one view and one head at a time.
Source: "Efficient Architectures for High Resolution Vision-Language Models", arXiv 2501.02584.
"""

import math

import numpy as np
import torch
from PIL import Image

VIT = "vision_encoder.vision_model.base_model.model."
HEAD_WIDTH = 64


def draw_test_picture() -> Image.Image:
    """Coloured patches under a gradient, wider than high, always the same."""
    patches = np.random.default_rng(0).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(patches).resize((390, 270), Image.Resampling.NEAREST), np.float32)
    return Image.fromarray((image * np.linspace(0.3, 1, 390, dtype=np.float32)[None, :, None]).astype(np.uint8))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    y = x @ weight.T
    return y if bias is None else y + bias


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight + bias


def softmax(scores: torch.Tensor) -> torch.Tensor:
    scores = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return scores / scores.sum(-1, keepdim=True)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, scale: float, causal: bool = False):
    """q (T, D), k and v (N, D) to (T, D), head by head."""
    outputs = []
    for q_head, k_head, v_head in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = q_head @ k_head.T * scale  # (T, N)
        if causal:
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        outputs.append(softmax(scores) @ v_head)
    return torch.cat(outputs, -1)


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x / 2 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-1.702 * x))


ACTIVATIONS = {"gelu": gelu, "gelu_new": gelu_tanh, "gelu_pytorch_tanh": gelu_tanh, "quick_gelu": quick_gelu}


def rotate(x: torch.Tensor, theta: float, dims: int) -> torch.Tensor:
    """Rotary positions on the first `dims` of one head's x (T, D); dimension i turns together with i + dims / 2."""
    half = dims // 2
    frequencies = 1 / theta ** (torch.arange(half) * 2 / dims)
    angles = torch.arange(len(x))[:, None] * frequencies  # (T, dims / 2)
    cos, sin = torch.cos(angles), torch.sin(angles)
    first, second, rest = x[:, :half], x[:, half:dims], x[:, dims:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


class Reference:
    """A published checkpoint as its paper describes it.

    Args:
        tensors: the state dict of checkpoint.pt.
        settings: config.json beside it.
        vision_config, text_config: configs of the CLIP vision transformer and of the Phi language model.

    Raises:
        ValueError: for another kind of encoder or decoder.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], settings: dict, vision_config, text_config):
        kinds = (vision_config.model_type, text_config.model_type)
        if kinds != ("clip_vision_model", "phi") or getattr(text_config, "qk_layernorm", False):
            raise ValueError(f"The reference knows CLIP with Phi (without qk_layernorm), not {' with '.join(kinds)}.")
        # Some checkpoints hold CLIP's vision transformer one module deeper.
        self.tensors = {name.replace(VIT + "vision_model.", VIT): tensor for name, tensor in tensors.items()}
        self.settings, self.vision, self.text = settings, vision_config, text_config
        self.tiles = settings["level"]  # level 2 has 2 x 2 crops, level 3 has 3 x 3

    def get(self, name: str) -> torch.Tensor:
        return self.tensors[name].float()

    def get_pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.get(name + ".weight"), self.get(name + ".bias")

    # --- Section 3.1: image to pixels ---

    def pixels(self, image: Image.Image, mean: list[float], std: list[float]) -> torch.Tensor:
        """(views, 3, height, width): the whole picture, then its crops column by column."""
        size, views = self.vision.image_size, []
        whole = self._resize(image, size)
        enlarged = self._resize(image, size * self.tiles)
        views.append(whole)
        for column in range(self.tiles):
            for row in range(self.tiles):
                left, top = column * size, row * size
                views.append(enlarged.crop((left, top, left + size, top + size)))
        values = torch.stack([torch.from_numpy(np.array(view)).permute(2, 0, 1) for view in views]) / 255
        return (values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    def _resize(self, image: Image.Image, size: int) -> Image.Image:
        wide = image.convert("RGB").resize((size, image.height), Image.Resampling.BICUBIC)
        return wide.resize((size, size), Image.Resampling.BICUBIC)

    # --- Section 2.2: vision features ---

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Views (V, 3, height, width) to the sequence (V * tokens, D) that the blocks read."""
        sequence = []
        for number, view in enumerate(pixels):
            is_global = number == 0
            lora = "second" if not is_global else "first" if self.settings["first_level"] else None
            norm = "vision_encoder.norm_lvl_1" if is_global else "vision_encoder.norm_lvl_2"
            tokens = layer_norm(self.vit(view, lora), *self.get_pair(norm), eps=1e-5)
            sequence.append(tokens + self.get("vision_encoder.connector.embedding.weight")[number])
        return torch.cat(sequence)

    def vit(self, view: torch.Tensor, lora: str | None) -> torch.Tensor:
        """One view (3, height, width) to its tokens (N, D), with one LoRA set or none."""
        config = self.vision
        p, patches = config.patch_size, []
        for row in range(config.image_size // p):
            for column in range(config.image_size // p):
                patches.append(view[:, row * p : (row + 1) * p, column * p : (column + 1) * p].flatten())
        x = self.adapted("embeddings.patch_embedding", torch.stack(patches), lora)
        x = torch.cat([self.get(VIT + "embeddings.class_embedding")[None], x])
        x = x + self.get(VIT + "embeddings.position_embedding.weight")
        x = layer_norm(x, *self.get_pair(VIT + "pre_layrnorm"), eps=config.layer_norm_eps)
        heads = config.num_attention_heads
        for layer in range(config.num_hidden_layers):
            name = f"encoder.layers.{layer}."
            y = layer_norm(x, *self.get_pair(VIT + name + "layer_norm1"), eps=config.layer_norm_eps)
            q, k, v = (self.adapted(f"{name}self_attn.{part}_proj", y, lora) for part in "qkv")
            y = attention(q, k, v, heads, scale=(config.hidden_size // heads) ** -0.5)
            x = x + self.adapted(name + "self_attn.out_proj", y, lora)
            y = layer_norm(x, *self.get_pair(VIT + name + "layer_norm2"), eps=config.layer_norm_eps)
            y = ACTIVATIONS[config.hidden_act](self.adapted(name + "mlp.fc1", y, lora))
            x = x + self.adapted(name + "mlp.fc2", y, lora)
        return x  # before the last norm

    def adapted(self, path: str, x: torch.Tensor, lora: str | None) -> torch.Tensor:
        """W x + b + 2 B A x. The patch convolution is a linear of each patch laid out as one row."""
        weight = self.get(f"{VIT}{path}.base_layer.weight").flatten(1)
        bias = f"{VIT}{path}.base_layer.bias"
        y = linear(x, weight, self.get(bias) if bias in self.tensors else None)
        if lora is not None:
            a = self.get(f"{VIT}{path}.lora_A.{lora}.weight").flatten(1)  # (rank, inputs)
            b = self.get(f"{VIT}{path}.lora_B.{lora}.weight").flatten(1)  # (outputs, rank)
            y = y + linear(linear(x, a), b) * 2  # alpha is twice the rank
        return y

    # --- Section 2.1: the language model and its cross-attention blocks ---

    def logits(self, ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """One text's ids (T) and its picture's features (N, D) to logits (T, vocabulary)."""
        x = self.get("lang_encoder.model.embed_tokens.weight")[ids]
        for layer in range(self.text.num_hidden_layers):
            if (layer + 1) % self.settings["cross_interval"] == 0 and layer >= self.settings["from_layer"]:
                x = self.block(layer, x, features)
            x = self.decoder_layer(layer, x)
        x = layer_norm(x, *self.get_pair("lang_encoder.model.final_layernorm"), eps=self.text.layer_norm_eps)
        return linear(x, *self.get_pair("lang_encoder.lm_head"))

    def block(self, layer: int, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        name = f"lang_encoder.model.layers.{layer}.cross_attn_layer."
        heads = max(self.text.hidden_size, self.vision.hidden_size) // HEAD_WIDTH
        y = layer_norm(x, *self.get_pair(name + "attn.norm"), eps=1e-5)
        q = linear(y, *self.get_pair(name + "attn.to_q"))
        k, v = linear(features, *self.get_pair(name + "attn.to_kv")).chunk(2, -1)
        y = attention(q, k, v, heads, scale=HEAD_WIDTH**-0.5)
        x = x + linear(y, *self.get_pair(name + "attn.to_out"))
        y = layer_norm(x, *self.get_pair(name + "ff.norm"), eps=1e-5)
        return x + linear(gelu(linear(y, *self.get_pair(name + "ff.fc1"))), *self.get_pair(name + "ff.fc2"))

    def decoder_layer(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Phi's layer: attention and MLP side by side on the same norm."""
        config, name = self.text, f"lang_encoder.model.layers.{layer}.decoder_layer."
        heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        theta = config.rope_parameters["rope_theta"]
        dims = int(width * config.rope_parameters["partial_rotary_factor"])
        y = layer_norm(x, *self.get_pair(name + "input_layernorm"), eps=config.layer_norm_eps)
        q, k, v = (linear(y, *self.get_pair(f"{name}self_attn.{part}_proj")) for part in "qkv")
        q = torch.cat([rotate(head, theta, dims) for head in q.split(width, -1)], -1)
        k = torch.cat([rotate(head, theta, dims) for head in k.split(width, -1)], -1)
        copies = heads // config.num_key_value_heads  # query heads that share a key head
        k, v = (torch.cat([head for head in z.split(width, -1) for _ in range(copies)], -1) for z in (k, v))
        attended = linear(
            attention(q, k, v, heads, scale=width**-0.5, causal=True), *self.get_pair(name + "self_attn.dense")
        )
        y = ACTIVATIONS[config.hidden_act](linear(y, *self.get_pair(name + "mlp.fc1")))
        return x + attended + linear(y, *self.get_pair(name + "mlp.fc2"))
