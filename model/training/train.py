"""Trains the network on the token files of corpus.py until steps or minutes are used up."""

import argparse
import os
import time

import numpy as np
import torch

from network import BASE_CONFIG, Model, Optimiser

WINDOW_TOKENS = 256
# The rate falls linearly over this last share of the run, to no less than RATE_MIN of itself.
DECAY_SHARE = 0.4
RATE_MIN = 0.02
EVALUATION_TOKENS = 8192
EVALUATION_BATCH = 8


def evaluate(model, tokens, limit=EVALUATION_TOKENS):
    """Mean negative log-likelihood over whole windows."""
    tokens = torch.from_numpy(tokens[: limit + 1].astype(np.int64))
    total, count = 0.0, 0
    with torch.no_grad():
        for at in range(0, len(tokens) - 1, WINDOW_TOKENS * EVALUATION_BATCH):
            part = tokens[at : at + WINDOW_TOKENS * EVALUATION_BATCH + 1]
            whole = (len(part) - 1) // WINDOW_TOKENS * WINDOW_TOKENS
            if whole == 0:
                break
            inputs = part[:whole].view(-1, WINDOW_TOKENS)
            targets = part[1 : whole + 1].view(-1, WINDOW_TOKENS)
            total += model(inputs, targets).item() * whole
            count += whole
    return total / count


def batches(tokens, size, rng):
    """Endless batches of windows, every window once per epoch."""
    windows = (len(tokens) - 1) // WINDOW_TOKENS
    while True:
        order = rng.permutation(windows)
        for at in range(0, windows - size + 1, size):
            starts = order[at : at + size] * WINDOW_TOKENS
            rows = [tokens[start : start + WINDOW_TOKENS + 1] for start in starts]
            yield torch.from_numpy(np.stack(rows).astype(np.int64))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="directory that corpus.py wrote")
    parser.add_argument("out", help="checkpoint to write")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=42.0)
    parser.add_argument("--batch", type=int, default=8, help="windows in a step")
    parser.add_argument("--warmup", type=int, default=25, help="steps")
    parser.add_argument("--matrix-rate", type=float, default=6e-3)
    parser.add_argument("--rest-rate", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--evaluate-every", type=int, default=500, help="steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    model = Model(BASE_CONFIG)
    optimiser = Optimiser(model)
    tokens = np.fromfile(os.path.join(args.data, "train.bin"), dtype=np.uint16)
    held_out = {
        name: np.fromfile(os.path.join(args.data, name), dtype=np.uint16)
        for name in sorted(os.listdir(args.data))
        if name.startswith("val_")
    }

    def save(step):
        state = {"config": BASE_CONFIG, "weights": model.state_dict()}
        torch.save(state | {"step": step, "tokens": step * args.batch * WINDOW_TOKENS}, args.out)

    start, step = time.monotonic(), 0
    for batch in batches(tokens, args.batch, np.random.default_rng(args.seed)):
        # Whichever is further, steps or time: so the schedule always comes to its end.
        done = max(step / args.steps, (time.monotonic() - start) / (args.minutes * 60))
        if done >= 1.0:
            break
        rate = min(1.0, (step + 1) / args.warmup)
        rate *= min(1.0, max(RATE_MIN, (1.0 - done) / DECAY_SHARE))
        # BitNet's two stages: decay pulls weights over the rounding threshold only early on.
        weight_decay = args.weight_decay if done < 0.5 else 0.0
        loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimiser.step(args.matrix_rate * rate, args.rest_rate * rate, weight_decay)
        optimiser.zero()
        step += 1
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.4f} done {done:.1%}", flush=True)
        if step % args.evaluate_every == 0:
            print({name: evaluate(model, part) for name, part in held_out.items()}, flush=True)
            save(step)
    save(step)
    print({name: evaluate(model, part, 40000) for name, part in held_out.items()})


if __name__ == "__main__":
    main()
