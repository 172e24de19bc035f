"""Text from a checkpoint, as it is generated.

python sample.py                                       # from the start of a document
python sample.py --prompt "def main(" --temperature 0.6
head -c 200 train.py | python sample.py --prompt -     # the prompt from standard input
"""

import codecs
import sys
from pathlib import Path

import torch

from command import BadInput, Parser, run_command
from prepare_pile import get_tokenizer
from train import Settings, find_device, load_checkpoint, load_model


def read_prompt(prompt):
    """The prompt's text; None stays None, "-" is standard input. Raises BadInput if it is empty or not UTF-8."""
    try:
        if prompt == "-":
            prompt = sys.stdin.buffer.read().decode("utf-8") if sys.stdin else ""
        elif prompt is not None:
            prompt.encode("utf-8")  # bytes that the shell could not decode arrive as lone surrogates
    except UnicodeError as error:
        raise BadInput(f"--prompt is not UTF-8 (at position {error.start}): give it in UTF-8") from None
    if prompt == "":
        raise BadInput("--prompt is empty: give some text, or leave it out to begin at the start of a document")
    return prompt


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--out_dir", default=Settings.out_dir, help="folder of the run (%(default)s)")
    parser.add_argument("--ckpt", default="ckpt.pt", help="checkpoint in it: ckpt.pt, ckpt-1.pt, best.pt (%(default)s)")
    parser.add_argument("--prompt", help="text to go on from; - reads it from standard input (the start of a document)")
    parser.add_argument("--num_samples", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=400, help="length of each in tokens (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top_k", type=int, default=50, help="choose only among so many likeliest (%(default)s)")
    parser.add_argument("--seed", type=int, default=1337, help="same seed, same text (%(default)s)")
    parser.add_argument("--device", help="cuda, cpu, mps ... (the best there is)")
    args = parser.parse_args(argv)
    for name, least in dict(num_samples=1, max_new_tokens=1, temperature=0, top_k=1, seed=0).items():
        if not least <= getattr(args, name) < 2**63:
            raise BadInput(f"--{name}={getattr(args, name)} must be at least {least} and below 2^63")
    prompt = read_prompt(args.prompt)
    device = find_device(args.device)

    path = Path(args.out_dir) / args.ckpt
    checkpoint = load_checkpoint(path, mmap=True)
    model = load_model(checkpoint, path, device)
    tokenizer = get_tokenizer(checkpoint["tokenizer"])
    tokens = [tokenizer.eot_token] if prompt is None else tokenizer.encode(prompt, disallowed_special=())
    idx = torch.tensor([tokens], device=device)  # (1, T)

    torch.manual_seed(args.seed)
    for _ in range(args.num_samples):
        print("-" * 80)
        # A token may be part of a character, so bytes go through a decoder that waits for the rest of it.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        print(prompt or "", end="")
        for token in model.stream(idx, args.max_new_tokens, args.temperature, args.top_k, tokenizer.n_vocab):
            if token.item() == tokenizer.eot_token:
                break
            print(decoder.decode(tokenizer.decode_single_token_bytes(token.item())), end="", flush=True)
        print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    run_command(main)
