#!/usr/bin/env bash
# What every host of a pod runs:  RUN=DIR run.sh RECIPE [key=value ...]
#
# Begins the run in the folder RUN, which all hosts share, or goes on with the run that is there already, so that a job
# may be started again as it stands. All hosts decide alike: no process can write to RUN before all have met, and each
# has looked by then. XGEN_FLAGS: more options, as "--coordinator HOST:PORT --processes N --process I".
set -euo pipefail
: "${RUN:?say where the run goes: a folder that all hosts share}"
read -r -a flags <<<"${XGEN_FLAGS:-}"

# exec: a signal that asks to save and leave must reach xgen, not this script.
if [[ -e "$RUN/recipe.toml" ]]; then
    exec xgen train --resume "$RUN" ${flags[@]+"${flags[@]}"}
fi
exec xgen train "$@" --run "$RUN" ${flags[@]+"${flags[@]}"}
