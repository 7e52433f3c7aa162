"""akvq_fx: torch.compile(model, backend="akvq") gives any traced vision-language model a 2-bit key-value cache."""
from pathlib import Path as _Path
_here = _Path(__file__).parent
if not (_here / "passes").is_dir():  # a checkout: passes/ and kernels/ lie beside akvq_fx/
    __path__.append(str(_here.parent))
