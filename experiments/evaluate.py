"""Zero-shot tasks (the paper's Table 3) through EleutherAI's lm-evaluation-harness.

    pip install lm_eval==0.4.13
    python -m experiments.evaluate                                        # out/ckpt.pt on the paper's seven tasks
    python -m experiments.evaluate runs/182m/unipool-1 --tasks arc_easy piqa --limit 100
    python -m experiments.evaluate --tasks my_task --include_path tasks/  # a task of your own, in the harness's YAML

The harness downloads each task's data from the hub, once. It asks for log-likelihoods and continuations; how they
become accuracies is its business.
"""

import itertools
from pathlib import Path

import torch
from tqdm import tqdm

from command import BadInput, Parser, run_command
from experiments.bench import machine, save_result
from prepare_pile import get_tokenizer
from train import autocast, find_device, load_checkpoint, load_model

try:
    import lm_eval
    import lm_eval.tasks
    import lm_eval.utils
    from lm_eval.api.model import TemplateLM
except ImportError:
    lm_eval, TemplateLM = None, object

HERE = Path(__file__).parent
TASKS = ["arc_easy", "arc_challenge", "piqa", "hellaswag", "winogrande", "lambada_openai", "race"]
NEW_TOKENS = 256  # of a continuation, unless the task says otherwise


def in_batches(items, size):
    return [items[i : i + size] for i in range(0, len(items), size)]


class Adapter(TemplateLM):
    """A UniPool model as the harness wants it. Texts longer than the model's context lose their beginning."""

    def __init__(self, model, tokenizer, batch_size):
        super().__init__()
        self.model, self.tokens, self.batch_size = model, tokenizer, batch_size
        self._device = model.head.weight.device

    @property
    def eot_token_id(self):  # also what stands before a text without context
        return self.tokens.eot_token

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return self.tokens.encode(string, disallowed_special=())

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
        """[(_, context ids, continuation ids)] -> [(log p(continuation | context) in nats, is it the likeliest?)]."""
        block_size = self.model.config.block_size
        results = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for batch in in_batches(order, self.batch_size):
                texts = [(requests[i][1] + requests[i][2])[-block_size - 1 :] for i in batch]
                idx = torch.zeros(len(batch), max(1, len(texts[0]) - 1), dtype=torch.int64)
                for row, text in zip(idx, texts):  # padding stands behind the text, where no token of it looks
                    row[: len(text) - 1] = torch.tensor(text[:-1])
                with autocast(self._device):
                    x, _, _ = self.model.trunk(idx.to(self._device))  # (B, T, C)
                    for i, text, x_i in zip(batch, texts, x):
                        n = min(len(requests[i][2]), len(text) - 1)  # tokens of the continuation that are predicted
                        logits = self.model.head(x_i[len(text) - 1 - n : len(text) - 1]).float()  # (n, V)
                        target = torch.tensor(text[len(text) - n :], device=self._device)  # (n,)
                        log_p = logits.log_softmax(dim=-1).gather(1, target[:, None]).sum().item()
                        results[i] = log_p, bool((logits.argmax(dim=-1) == target).all())
                bar.update(len(batch))
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Each text's log-likelihood in nats, every token predicted once, from as much before it as windows allow."""
        windows, sizes = [], []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            parts = lm_eval.utils.get_rolling_token_windows(
                tokens, prefix_token=self.eot_token_id, max_seq_len=self.model.config.block_size, context_len=1
            )
            own = [(None, *lm_eval.utils.make_disjoint_window(part)) for part in parts]
            windows += own
            sizes.append(len(own))
        values = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        return [sum(log_p for log_p, _ in itertools.islice(values, size)) for size in sizes]

    def generate_until(self, requests, disable_tqdm=False):
        """Each prompt's continuation, up to the first of its stop strings, which is left out."""
        block_size, results = self.model.config.block_size, [None] * len(requests)

        def ask(request):
            """The prompt's tokens, and all that continuations of one batch must have in common."""
            context, options = request.args
            most = min(int(options.get("max_gen_toks", NEW_TOKENS)), block_size - 1)
            stops = options.get("until") or []
            stops = (stops,) if isinstance(stops, str) else tuple(stops)
            temperature = float(options.get("temperature") or 0) if options.get("do_sample") else 0.0
            tokens = (self.tok_encode(context) or [self.eot_token_id])[-(block_size - most) :]
            return tokens, (len(tokens), most, stops, temperature)

        asked = [ask(request) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: asked[i][1])
        with tqdm(total=len(requests), desc="continuations", disable=disable_tqdm) as bar:
            for (_, most, stops, temperature), group in itertools.groupby(order, key=lambda i: asked[i][1]):
                for batch in in_batches(list(group), self.batch_size):
                    idx = torch.tensor([asked[i][0] for i in batch], device=self._device)
                    for i, text in zip(batch, self.continuations(idx, most, stops, temperature)):
                        results[i] = text
                    bar.update(len(batch))
        return results

    def continuations(self, idx, most, stops, temperature):
        """idx: (B, T) prompts of one length -> B strings of up to `most` tokens."""
        new = [[] for _ in idx]  # tokens
        texts, ended = [""] * len(idx), [False] * len(idx)
        with autocast(self._device):
            for token in self.model.stream(idx, most, temperature, n_vocab=self.tokens.n_vocab):
                for b, value in enumerate(token[:, 0].tolist()):
                    if ended[b]:
                        continue
                    if value != self.eot_token_id:
                        new[b].append(value)
                        texts[b] = self.tokens.decode(new[b])
                    first = min((at for at in map(texts[b].find, filter(None, stops)) if at >= 0), default=None)
                    if first is not None:
                        texts[b] = texts[b][:first]
                    ended[b] = first is not None or value == self.eot_token_id
                if all(ended):
                    break
        return texts


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", default="out", help="folder of a run (%(default)s)")
    parser.add_argument("--ckpt", default="ckpt.pt", help="checkpoint in it: ckpt.pt, best.pt ... (%(default)s)")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help=f"names in the harness ({' '.join(TASKS)})")
    parser.add_argument("--include_path", help="folder with tasks of your own")
    parser.add_argument("--num_fewshot", type=int, default=0, help="examples in the prompt (%(default)s)")
    parser.add_argument("--limit", type=int, help="only so many examples of each task")
    parser.add_argument("--batch_size", type=int, default=16, help="texts at once (%(default)s)")
    parser.add_argument("--device", help="cuda, cpu ... (the best there is)")
    parser.add_argument("--name", default="evaluate", help="of the file in --results (%(default)s)")
    parser.add_argument("--results", default=HERE / "results", help="folder for the JSON file; empty for none")
    args = parser.parse_args(argv)
    for name, least in dict(batch_size=1, num_fewshot=0, limit=1).items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise BadInput(f"--{name}={getattr(args, name)} must be at least {least}")
    if lm_eval is None:
        raise BadInput("lm_eval is missing: pip install lm_eval==0.4.13")
    device = find_device(args.device)
    about = machine(device)
    path = Path(args.run) / args.ckpt
    checkpoint = load_checkpoint(path, mmap=True)
    model = load_model(checkpoint, path, device).eval()
    adapter = Adapter(model, get_tokenizer(checkpoint["tokenizer"]), args.batch_size)
    manager = lm_eval.tasks.TaskManager(include_path=args.include_path)
    unknown = [task for task in args.tasks if task not in manager.all_tasks]
    if unknown:
        raise BadInput(f"--tasks={unknown[0]} is not a task that the harness knows: `lm-eval ls tasks` lists them")
    try:
        found = lm_eval.simple_evaluate(adapter, tasks=args.tasks, num_fewshot=args.num_fewshot, limit=args.limit,
                                        task_manager=manager, log_samples=False)  # fmt: skip
    except OSError as error:  # requests' connection errors are OSErrors
        raise BadInput(f"--tasks={' '.join(args.tasks)}: the data cannot be read ({error}): mend the connection, or "
                       "give tasks whose data is here") from None  # fmt: skip
    print(lm_eval.utils.make_table(found))
    if str(args.results):
        save_result(args.results, args.name, "evaluate", argv, about, run=str(args.run), step=checkpoint["step"],
                    seed=checkpoint["settings"]["seed"], lm_eval=lm_eval.__version__, limit=args.limit,
                    num_fewshot=args.num_fewshot, results=found["results"])  # fmt: skip


if __name__ == "__main__":
    run_command(main)
