#!/usr/bin/env bash
# TPUs on GKE, by xpk (pip install xpk):
#   CLUSTER=pod PROJECT=mine ZONE=us-central2-b TPU_TYPE=v4-1024 IMAGE=gcr.io/mine/xgen RUN=/runs/mine \
#   STORAGE=runs deploy/gke.sh RECIPE [key=value ...]
#
# STORAGE: an `xpk storage` that is mounted where RUN lies. IMAGE: built from deploy/Dockerfile. SLICES: how many of
# TPU_TYPE (1). MANIFEST=FILE writes what would be created to FILE and creates nothing.
set -euo pipefail
: "${CLUSTER:?}" "${PROJECT:?}" "${ZONE:?}" "${TPU_TYPE:?as v4-1024: named by cores}" "${IMAGE:?}" "${RUN:?}"
: "${1:?say what to train: deploy/gke.sh RECIPE [key=value ...]}"

options=()
[[ -n "${STORAGE:-}" ]] && options+=(--storage "$STORAGE")
[[ -n "${MANIFEST:-}" ]] && options+=(--dry-run --skip-validation --output-manifest-file "$MANIFEST")

# exec: xpk passes SIGTERM to the shell that it starts for the command. 300 s are for the checkpoint; 75 (saved and
# stopped) and 76 (another process was lost) begin again where the run was, as what the kernel kills does anyway.
exec xpk workload create \
    --workload "${WORKLOAD:-xgen}" --cluster "$CLUSTER" --project "$PROJECT" --zone "$ZONE" \
    --tpu-type "$TPU_TYPE" --num-slices "${SLICES:-1}" --docker-image "$IMAGE" \
    --env "RUN=$RUN" --command "exec bash /opt/xgen/run.sh $(printf '%q ' "$@")" \
    --max-restarts "${RESTARTS:-50}" --restart-on-exit-codes 75,76 --termination-grace-period-seconds 300 \
    ${options[@]+"${options[@]}"}
