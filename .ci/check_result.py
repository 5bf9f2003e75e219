"""Hold the main job's result to what the README promises; prints each figure, exits 1 when one fails."""

import json
import sys
from pathlib import Path


def main(path: str) -> int:
    result = json.loads(Path(path).read_text(encoding="utf-8"))
    last = result["stages"][-1]["name"]
    full = max(row["context"] for row in result["fixed_target"])
    gain = next(
        row
        for row in result["fixed_target_gain"]
        if (row["checkpoint"], row["from_context"], row["to_context"]) == (last, full // 4, full)
    )
    first = {r["context"]: r["loss"] for r in result["fixed_target"] if r["checkpoint"] == result["stages"][0]["name"]}
    own = result["stages"][0]["length"]
    checks = {
        f"ends within 360 s: {result['seconds']:.0f}": result["seconds"] < 360,
        f"under 3 GiB: {result['peak_memory_bytes'] / 2**30:.2f}": result["peak_memory_bytes"] < 3 * 2**30,
        f"three stage checkpoints: {len(result['stages'])}": len(result["stages"]) == 3,
        f"bits per byte {result['bits_per_byte']:.3f} below xz's {result['xz_bits_per_byte']:.3f}": (
            result["bits_per_byte"] < result["xz_bits_per_byte"]
        ),
        f"longer context helps: {gain['difference']:+.4f} nats [{gain['low']:+.4f}, {gain['high']:+.4f}]": (
            gain["high"] < 0
        ),
        f"first stage fails past its length: {first[own]:.3f} to {first[full]:.3f} nats": (
            first[full] > first[own] + 0.05
        ),
        f"report written: {result['report']}": Path(path).parent.joinpath(result["report"]).is_file(),
    }
    for text, holds in checks.items():
        print("ok  " if holds else "FAIL", text)
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
