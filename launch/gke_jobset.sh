#!/usr/bin/env bash
# A run on one TPU slice of GKE: fills launch/gke_jobset.yaml in and hands it to kubectl.
#   export NAME=first IMAGE=REGION-docker.pkg.dev/PROJECT/REPO/seqpe_jax ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4 HOSTS=4 CHIPS=4
#   docker build -f launch/Dockerfile -t "$IMAGE" . && docker push "$IMAGE"
#   bash launch/gke_jobset.sh apply --config=configs/wikitext103_gpt2.py --workdir=gs://BUCKET/wt103 --config.steps=1000
#   bash launch/gke_jobset.sh logs; bash launch/gke_jobset.sh delete
# print writes the filled-in file instead of applying it. HOSTS x CHIPS = the topology's chips.
# SERVICE_ACCOUNT: of Kubernetes, bound to one that may write the bucket (default). CPU (8) and MEMORY (32Gi) are requested of each host.
# CLAIM: a claim of a ReadWriteMany volume (Filestore), mounted at /storage, for a --workdir=/storage/runs/NAME and the data's cache.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The arguments as a list of JSON, which is one of YAML.
json_list() {
  local argument separator="" list=""
  for argument in "$@"; do
    argument=${argument//\\/\\\\}
    list+="$separator\"${argument//\"/\\\"}\""
    separator=", "
  done
  printf '[%s]' "$list"
}

check_workdir() {
  local argument workdir=""
  for argument in "$@"; do
    case "$argument" in --workdir=*) workdir=${argument#--workdir=} ;; esac
  done
  case "$workdir" in
    gs://* | s3://*) return 0 ;;
    /storage/*) if [ -n "${CLAIM:-}" ]; then return 0; fi ;;
  esac
  echo "error: --workdir=$workdir is not where all hosts can write: give --workdir=gs://BUCKET/NAME, or set CLAIM and give --workdir=/storage/runs/NAME" >&2
  return 2
}

# The template with each ${VARIABLE} replaced; one that is unset or empty is an error.
filled_in() {
  local text name names
  text=$(<launch/gke_jobset.yaml)
  names=$(grep -o '\${[A-Z_]*}' <<< "$text" | sort -u | tr -d '${}')
  for name in $names; do
    if [ -z "${!name:-}" ]; then
      echo "error: $name is not set; see the head of launch/gke_jobset.sh" >&2
      return 2
    fi
    text=${text//"\${$name}"/"${!name}"}
  done
  printf '%s\n' "$text"
}

render() {
  check_workdir "$@" || return
  SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default} CPU=${CPU:-8} MEMORY=${MEMORY:-32Gi}
  STORAGE="emptyDir: {}" CACHE="{name: HOME, value: /storage}" # compiled programs are in the bucket
  if [ -n "${CLAIM:-}" ]; then
    STORAGE="persistentVolumeClaim: {claimName: $CLAIM}" CACHE="{name: SEQPE_JAX_CACHE, value: /storage/cache}"
  fi
  ARGUMENTS=$(json_list "$@")
  filled_in
}

job_set() {
  if [ -z "${NAME:-}" ]; then
    echo "error: NAME is not set; see the head of launch/gke_jobset.sh" >&2
    return 2
  fi
  case "$1" in
    logs) kubectl logs --follow --prefix --max-log-requests=1000 --selector="jobset.sigs.k8s.io/jobset-name=$NAME" ;;
    delete) kubectl delete jobset "$NAME" ;;
  esac
}

action=${1:-}
case "$action" in
  print) shift && render "$@" ;;
  apply) shift && text=$(render "$@") && kubectl apply -f - <<< "$text" ;;
  logs | delete) job_set "$action" ;;
  *) echo "usage: launch/gke_jobset.sh apply ARGUMENTS... | print ARGUMENTS... | logs | delete" >&2; exit 2 ;;
esac
