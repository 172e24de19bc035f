"""Zero-shot tasks (the paper's Table 3) through EleutherAI's lm-evaluation-harness.

    pip install lm_eval==0.4.13
    python -m experiments.evaluate                                        # out/ckpt.pt on the paper's seven tasks
    python -m experiments.evaluate runs/182m/unipool-1 --tasks arc_easy piqa --limit 100
    python -m experiments.evaluate --tasks my_task --include_path tasks/  # a task of your own, in the harness's YAML

The harness downloads each task's data from the hub, once. It asks for the log-likelihoods of endings; how they become
accuracies is its business. Tasks that ask for generated text, or for the perplexity of whole texts, are refused.
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from command import BadInput, run_command
from experiments.common import ExperimentParser, at_least, machine, save
from prepare_pile import get_tokenizer
from train import autocast, find_device, load_checkpoint, load_model

try:
    import lm_eval
    import lm_eval.tasks
    import lm_eval.utils
    from lm_eval.api.model import TemplateLM
except ImportError:
    lm_eval, TemplateLM = None, object

TASKS = ["arc_easy", "arc_challenge", "piqa", "hellaswag", "winogrande", "lambada_openai", "race"]


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
        results = [None] * len(requests)
        most = self.model.config.block_size + 1  # tokens: the last is only predicted
        for _, context, ending in requests:
            if not 0 < len(ending) < most:
                text = self.tokens.decode(context[-8:] + ending[:8])
                raise BadInput(f"--tasks: an ending of {len(ending)} tokens, near {text!r}, has no score: it must have "
                               f"1 to {most - 1} of its own")  # fmt: skip
        first = [self.eot_token_id]  # where a context of spaces has become part of the ending
        texts = [torch.tensor(((context or first) + ending)[-most:]) for _, context, ending in requests]
        cut = sum(len(context) + len(ending) > most for _, context, ending in requests)
        if cut:
            print(f"{cut} of {len(requests)} texts lost their beginning, to fit {most - 1} tokens", file=sys.stderr)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for start in tqdm(range(0, len(order), self.batch_size), desc="log-likelihoods", disable=disable_tqdm):
            batch = order[start : start + self.batch_size]
            # Padding stands behind the text, where no token of it looks.
            idx = torch.nn.utils.rnn.pad_sequence([texts[i] for i in batch], batch_first=True).to(self._device)
            with autocast(self._device):
                logits = self.model(idx[:, :-1]).logits  # (B, T, V)
            for i, tokens, of_text in zip(batch, idx, logits):
                end = len(texts[i])
                predicted = slice(end - len(requests[i][2]), end)  # the tokens of the ending
                log_p = of_text[predicted.start - 1 : end - 1].float().log_softmax(dim=-1)  # (n, V)
                of_ending = log_p.gather(1, tokens[predicted, None]).sum().item()
                results[i] = of_ending, bool((log_p.argmax(dim=-1) == tokens[predicted]).all())
        return results

    def loglikelihood_rolling(self, requests, **kwargs):
        raise BadInput("--tasks: one of them asks for the perplexity of whole texts: give tasks that compare endings")

    def generate_until(self, requests, **kwargs):
        raise BadInput("--tasks: one of them asks for generated text: give tasks that compare endings")


def main(argv=None):
    parser = ExperimentParser(__doc__, "evaluate")
    parser.add_argument("run", nargs="?", default="out", help="folder of a run (%(default)s)")
    parser.add_argument("--ckpt", default="ckpt.pt", help="checkpoint in it: ckpt.pt, best.pt ... (%(default)s)")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help=f"names in the harness ({' '.join(TASKS)})")
    parser.add_argument("--include_path", help="folder with tasks of your own")
    parser.add_argument("--limit", type=at_least(1), help="only so many examples of each task")
    parser.add_argument("--batch_size", type=at_least(1), default=16, help="texts at once (%(default)s)")
    parser.add_argument("--device", help="cuda, cpu ... (the best there is)")
    args = parser.parse_args(argv)
    if lm_eval is None:
        raise BadInput("lm_eval is missing: pip install lm_eval==0.4.13")
    device = find_device(args.device)
    about = machine(device)
    path = Path(args.run) / args.ckpt
    checkpoint = load_checkpoint(path, mmap=True)
    model = load_model(checkpoint, path, device)
    adapter = Adapter(model, get_tokenizer(checkpoint["tokenizer"]), args.batch_size)
    manager = lm_eval.tasks.TaskManager(include_path=args.include_path)
    unknown = [task for task in args.tasks if task not in manager.all_tasks]
    if unknown:
        raise BadInput(f"--tasks={unknown[0]} is not a task that the harness knows: `lm-eval ls tasks` lists them")
    try:
        found = lm_eval.simple_evaluate(adapter, tasks=args.tasks, num_fewshot=0, limit=args.limit,
                                        task_manager=manager, log_samples=False)  # fmt: skip
    except OSError as error:  # requests' connection errors are OSErrors
        raise BadInput(f"--tasks={' '.join(args.tasks)}: the data cannot be read ({error}): mend the connection, or "
                       "give tasks whose data is here") from None  # fmt: skip
    save(args, about, lm_eval.utils.make_table(found) + "\n", run=str(args.run), step=checkpoint["step"],
         seed=checkpoint["settings"]["seed"], lm_eval=lm_eval.__version__, limit=args.limit, num_fewshot=0,
         results=found["results"])  # fmt: skip


if __name__ == "__main__":
    run_command(main)
