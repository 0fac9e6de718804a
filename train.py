"""Train a model: `python train.py [--config configs/tinystories.yaml]`."""

from __future__ import annotations

import argparse
import signal
import sys
import threading

from mantrans import out_of_memory
from mantrans.config import Config
from mantrans.errors import MantransError
from mantrans.training.trainer import Trainer


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/quickstart.yaml", help="a YAML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.field=value",
        help="overrule the config, e.g. training.learning_rate=3e-4; may be repeated",
    )
    parser.add_argument(
        "--resume", metavar="PATH", help="a checkpoint, or 'latest': the experiment's newest"
    )
    parser.add_argument(
        "--no-coherence-eval", action="store_true", help="do not ask a Claude model for marks"
    )
    parser.add_argument(
        "--debug-nan",
        action="store_true",
        help="stop at the first step that is not finite, and name the layer",
    )
    parser.add_argument(
        "--profile", type=int, default=0, metavar="N", help="profile N steps, see runs/NAME"
    )
    parser.add_argument(
        "--no-selfcheck", action="store_true", help="on a GPU: do not check the kernels first"
    )
    return parser.parse_args()


def background_failure(failure: threading.ExceptHookArgs) -> None:
    """TensorBoard writes from a thread of its own; a disk that refuses it is no news by then."""
    if isinstance(failure.exc_value, OSError):
        print(
            f"warning: TensorBoard's files are not written on ({failure.exc_value.strerror})",
            file=sys.stderr,
        )
    else:
        threading.__excepthook__(failure)


def main() -> int:
    args = arguments()
    threading.excepthook = background_failure
    try:
        with out_of_memory.explained():
            trainer = Trainer(
                Config.load(args.config, args.set),
                resume=args.resume,
                evaluate_coherence=not args.no_coherence_eval,
                debug_nan=args.debug_nan,
                check_kernels=not args.no_selfcheck,
                profile=args.profile,
            )
            trainer.run()
    except MantransError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 130 if trainer.stop_signal == signal.SIGINT else 0


if __name__ == "__main__":
    sys.exit(main())
