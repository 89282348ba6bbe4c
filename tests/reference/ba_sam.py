"""SAM's image encoder with BA-SAM (arXiv:2304.02643, 2401.02317), attention query by query."""

import math

import torch
import torch.nn.functional as F


def resized(table, length):
    """Resize a table [L, ...] linearly, pixel centres at halves."""
    rows = []
    for index in range(length):
        place = (index + 0.5) * len(table) / length - 0.5
        place = min(max(place, 0), len(table) - 1)
        below = min(math.floor(place), len(table) - 2)
        rows.append(table[below] * (below + 1 - place) + table[below + 1] * (place - below))
    return torch.stack(rows)


def distance_bias(distance, length, train_side, mode, beta):
    if mode == "full":
        return -beta * distance / train_side
    if mode == "extrapolation":
        return -beta * max(0, distance - (train_side - 1)) / train_side
    if mode == "stretch":
        return -beta * max(0, distance / train_side - distance / length)
    return 0.0


def attention(attn, tokens, grid_hw, *, factor=1.0, mode="none", beta=0.0, train_side=1):
    """Attend among tokens [H * W, C]."""
    height, width = grid_hw
    table_h = resized(attn.rel_pos_h, 2 * height - 1)
    table_w = resized(attn.rel_pos_w, 2 * width - 1)
    heads, dim = attn.num_heads, tokens.shape[1] // attn.num_heads
    qkv = (tokens @ attn.qkv.weight.T + attn.qkv.bias).view(-1, 3, heads, dim)
    outputs = []
    for a in range(height * width):
        for head in range(heads):
            q = qkv[a, 0, head]
            logits = []
            for b in range(height * width):
                dy, dx = a // width - b // width, a % width - b % width
                relative = q @ table_h[dy + height - 1] + q @ table_w[dx + width - 1]
                if mode == "official":
                    relative = attn.ba_sam_coefficient * relative
                similarity = q @ qkv[b, 1, head] * dim**-0.5 * factor
                distance = distance_bias(abs(dy), height, train_side, mode, beta)
                distance += distance_bias(abs(dx), width, train_side, mode, beta)
                logits.append(similarity + relative + distance)
            weights = torch.stack(logits).softmax(0)
            outputs.append(sum(w * qkv[b, 2, head] for b, w in enumerate(weights)))
    joined = torch.stack(outputs).view(height * width, heads * dim)
    return joined @ attn.proj.weight.T + attn.proj.bias


def windows(x, side):
    """Cut tokens [H, W, C] into windows, those at the border filled up with zeros."""
    for top in range(0, x.shape[0], side):
        for left in range(0, x.shape[1], side):
            window = x.new_zeros(side, side, x.shape[2])
            part = x[top : top + side, left : left + side]
            window[: part.shape[0], : part.shape[1]] = part
            yield top, left, window


def encode(encoder, images, *, factor=1.0, mode="none", beta=0.0):
    """Embed images [B, 3, H, W], one after the other."""
    train_side = encoder.img_size // 16
    outputs = []
    for image in images:
        patches = F.conv2d(
            image, encoder.patch_embed.proj.weight, encoder.patch_embed.proj.bias, stride=16
        )
        x = patches.permute(1, 2, 0)  # [H, W, C]
        height, width, channels = x.shape
        columns = resized(encoder.pos_embed[0], height).transpose(0, 1)
        x = x + resized(columns, width).transpose(0, 1)
        for block in encoder.blocks:
            normed = F.layer_norm(x, (channels,), block.norm1.weight, block.norm1.bias, 1e-6)
            if block.window_size:
                side = block.window_size
                attended = torch.zeros_like(x)
                for top, left, window in windows(normed, side):
                    out = attention(block.attn, window.reshape(-1, channels), (side, side))
                    part = attended[top : top + side, left : left + side]
                    part += out.view(side, side, -1)[: part.shape[0], : part.shape[1]]
            else:
                attended = attention(
                    block.attn,
                    normed.reshape(-1, channels),
                    (height, width),
                    factor=factor,
                    mode=mode,
                    beta=beta,
                    train_side=train_side,
                ).view(height, width, channels)
            x = x + attended
            normed = F.layer_norm(x, (channels,), block.norm2.weight, block.norm2.bias, 1e-6)
            hidden = F.linear(normed, block.mlp.lin1.weight, block.mlp.lin1.bias)
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + F.linear(hidden, block.mlp.lin2.weight, block.mlp.lin2.bias)
        outputs.append(encoder.neck(x.permute(2, 0, 1)[None])[0])
    return torch.stack(outputs)
