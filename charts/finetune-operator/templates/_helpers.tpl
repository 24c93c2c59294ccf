{{- define "finetune.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 50 | trimSuffix "-" }}
{{- end }}

{{/* A DNS label, as Services need: a release may have dots in its name and begin with a digit. There is room for the
     longest suffix within 63 characters. */}}
{{- define "finetune.fullname" -}}
{{- $name := include "finetune.name" . }}
{{- $full := printf "%s-%s" .Release.Name $name }}
{{- if .Values.fullnameOverride }}
{{- $full = .Values.fullnameOverride }}
{{- else if contains $name .Release.Name }}
{{- $full = .Release.Name }}
{{- end }}
{{- regexReplaceAll "^([0-9])" (replace "." "-" $full) "r-${1}" | trunc 50 | trimAll "-" }}
{{- end }}

{{/* Of what has no namespace: releases of one name in two namespaces do not share it. */}}
{{- define "finetune.clusterName" -}}
{{- printf "%s:%s" .Release.Namespace (include "finetune.fullname" .) }}
{{- end }}

{{- define "finetune.selectorLabels" -}}
app.kubernetes.io/name: {{ include "finetune.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "finetune.labels" -}}
{{ include "finetune.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | quote }}
{{- end }}

{{- define "finetune.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "finetune.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- required "serviceAccount.name: name the account that is there already, or let serviceAccount.create be true" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{/* Of a map with repository, tag and digest, and the tag to take where there is none. */}}
{{- define "finetune.image" -}}
{{- if .image.digest }}
{{- printf "%s@%s" .image.repository .image.digest }}
{{- else }}
{{- printf "%s:%s" .image.repository (default .tag .image.tag) }}
{{- end }}
{{- end }}

{{- define "finetune.progressHost" -}}
{{- printf "%s-progress.%s.svc" (include "finetune.fullname" .) .Release.Namespace }}
{{- end }}

{{- define "finetune.dashboardHost" -}}
{{- printf "%s-dashboard.%s.svc" (include "finetune.fullname" .) .Release.Namespace }}
{{- end }}

{{/* The container's ports, as far as their servers are on: each has one of its own. */}}
{{- define "finetune.ports" -}}
{{- $servers := list (list "metrics" .Values.metrics.port) }}
{{- if .Values.progress.enabled }}
{{- $servers = append $servers (list "progress" .Values.progress.port) }}
{{- end }}
{{- if .Values.dashboard.enabled }}
{{- $servers = append $servers (list "dashboard" .Values.dashboard.port) }}
{{- end }}
{{- $taken := dict }}
{{- range $servers }}
{{- $name := first . }}
{{- $port := int (last .) | toString }}
{{- with get $taken $port }}
{{- fail (printf "%s.port and %s.port are both %s; give each server a port of its own" . $name $port) }}
{{- end }}
{{- $_ := set $taken $port $name }}
- name: {{ $name }}
  containerPort: {{ $port }}
{{- end }}
{{- end }}

{{/* How the progress server and the dashboard get their certificate: none, own, or files. */}}
{{- define "finetune.tlsMode" -}}
{{- $given := list .Values.tls.certManager.enabled (ne .Values.tls.existingSecret "") }}
{{- if not (and .Values.tls.enabled (or .Values.progress.enabled .Values.dashboard.enabled)) }}none
{{- else if and .Values.tls.certManager.enabled .Values.tls.existingSecret }}
{{- fail "tls: certManager.enabled and existingSecret exclude each other; choose one" }}
{{- else if has true $given }}files
{{- else }}own
{{- end }}
{{- end }}

{{/* The Secret with the certificate, whoever fills it. */}}
{{- define "finetune.tlsSecret" -}}
{{- default (printf "%s-progress-tls" (include "finetune.fullname" .)) .Values.tls.existingSecret }}
{{- end }}

{{/* The operator's settings. Every name is a field of finetune_operator.settings. */}}
{{- define "finetune.env" -}}
{{- $mode := include "finetune.tlsMode" . }}
- name: FINETUNE_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: FINETUNE_IDENTITY
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
{{- with .Values.watchNamespaces }}
- name: FINETUNE_WATCH_NAMESPACES
  value: {{ join "," . | quote }}
{{- end }}
- name: FINETUNE_PARALLEL_RECONCILES
  value: {{ int .Values.operator.parallelReconciles | quote }}
- name: FINETUNE_RESYNC_SECONDS
  value: {{ .Values.operator.resyncSeconds | quote }}
- name: FINETUNE_PROGRESS_PATCH_SECONDS
  value: {{ .Values.operator.progressPatchSeconds | quote }}
- name: FINETUNE_LOG_FORMAT
  value: {{ .Values.operator.logFormat | quote }}
- name: FINETUNE_METRICS_PORT
  value: {{ int .Values.metrics.port | quote }}
- name: FINETUNE_PROGRESS_PORT
  value: {{ int .Values.progress.port | quote }}
- name: FINETUNE_PERMISSIONS__REMOTE_CODE
  value: {{ .Values.permissions.remoteCode | quote }}
- name: FINETUNE_PERMISSIONS__PRIVILEGED_POD_TEMPLATE
  value: {{ .Values.permissions.privilegedPodTemplate | quote }}
{{- with .Values.permissions.serviceAccounts }}
- name: FINETUNE_PERMISSIONS__SERVICE_ACCOUNTS
  value: {{ join "," . | quote }}
{{- end }}
{{- if .Values.trainer.s3.linkLocal }}
- name: FINETUNE_TRAINER__S3_LINK_LOCAL
  value: "true"
{{- end }}
- name: FINETUNE_TRAINER__IMAGE
  value: {{ include "finetune.image" (dict "image" .Values.trainer.image "tag" .Chart.AppVersion) | quote }}
- name: FINETUNE_TRAINER__GPU_MEMORY
  value: {{ .Values.trainer.gpuMemory | quote }}
{{- with .Values.trainer.gpuTypes }}
- name: FINETUNE_TRAINER__GPU_TYPES
  value: {{ toJson . | quote }}
{{- end }}
{{- with .Values.trainer.s3.endpoint }}
- name: FINETUNE_TRAINER__S3_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- with .Values.trainer.s3.region }}
- name: FINETUNE_TRAINER__S3_REGION
  value: {{ . | quote }}
{{- end }}
{{- with .Values.trainer.s3.secret }}
- name: FINETUNE_TRAINER__S3_SECRET
  value: {{ . | quote }}
{{- end }}
{{- with .Values.trainer.modelMirrorClaim }}
- name: FINETUNE_TRAINER__MODEL_MIRROR_CLAIM
  value: {{ . | quote }}
{{- end }}
- name: FINETUNE_TRAINER__RUN_AS_USER
  value: {{ with .Values.trainer.runAsUser }}{{ int64 . | quote }}{{ else }}""{{ end }}
{{- if or .Values.progress.enabled .Values.dashboard.enabled }}
- name: FINETUNE_ADDRESS
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- end }}
{{- if .Values.dashboard.enabled }}
- name: FINETUNE_DASHBOARD__PORT
  value: {{ int .Values.dashboard.port | quote }}
- name: FINETUNE_DASHBOARD__SERVICE
  value: {{ printf "%s-dashboard" (include "finetune.fullname" .) | quote }}
{{- if .Values.dashboard.proxy.existingSecret }}
- name: FINETUNE_DASHBOARD__PROXY_SECRET
  value: /etc/finetune-operator/dashboard/secret
- name: FINETUNE_DASHBOARD__USER_HEADER
  value: {{ .Values.dashboard.proxy.userHeader | quote }}
- name: FINETUNE_DASHBOARD__GROUPS_HEADER
  value: {{ .Values.dashboard.proxy.groupsHeader | quote }}
{{- end }}
{{- end }}
{{- if .Values.progress.enabled }}
- name: FINETUNE_PROGRESS_SERVICE
  value: {{ printf "%s-progress" (include "finetune.fullname" .) | quote }}
- name: FINETUNE_TRAINER__PROGRESS_URL
  value: {{ printf "%s://%s:%d" (ternary "http" "https" (eq $mode "none")) (include "finetune.progressHost" .) (int .Values.progress.port) | quote }}
{{- end }}
{{- if eq $mode "own" }}
- name: FINETUNE_PROGRESS_TLS_SECRET
  value: {{ include "finetune.tlsSecret" . | quote }}
{{- else if eq $mode "files" }}
- name: FINETUNE_PROGRESS_TLS_CERT
  value: /etc/finetune-operator/tls/tls.crt
- name: FINETUNE_PROGRESS_TLS_KEY
  value: /etc/finetune-operator/tls/tls.key
{{- /* For pods that report; without them a Secret needs no ca.crt. */}}
{{- if and .Values.progress.enabled (not .Values.tls.caConfigMap) }}
- name: FINETUNE_PROGRESS_TLS_CA
  value: /etc/finetune-operator/tls/ca.crt
{{- end }}
{{- end }}
{{- if and .Values.progress.enabled (ne $mode "none") .Values.tls.caConfigMap }}
- name: FINETUNE_TRAINER__PROGRESS_CA_CONFIG_MAP
  value: {{ .Values.tls.caConfigMap | quote }}
{{- end }}
{{- with .Values.operator.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The restricted Pod Security level, and a root file system that cannot be written to. */}}
{{- define "finetune.podSecurity" -}}
runAsNonRoot: true
seccompProfile:
  type: RuntimeDefault
{{- end }}
{{- define "finetune.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
readOnlyRootFilesystem: true
{{- end }}
