{{- define "mayfly.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "mayfly.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains (include "mayfly.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "mayfly.name" .) | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What pods are selected by; never changes, or an upgrade would be refused. */}}
{{- define "mayfly.selector" -}}
app.kubernetes.io/name: {{ include "mayfly.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "mayfly.labels" -}}
{{- include "mayfly.labelsAnd" (dict "root" . "labels" dict) -}}
{{- end -}}

{{/* And those of one object: dict "root" $ "labels" them */}}
{{- define "mayfly.labelsAnd" -}}
{{ include "mayfly.selector" .root }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service | quote }}
app.kubernetes.io/part-of: mayfly
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | quote }}
{{- with merge (dict) .labels .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "mayfly.dispatcher.selector" -}}
{{ include "mayfly.selector" . }}
app.kubernetes.io/component: dispatcher
{{- end -}}

{{- define "mayfly.dispatcher.labels" -}}
{{ include "mayfly.labels" . }}
app.kubernetes.io/component: dispatcher
{{- end -}}

{{/* With the root and the group's name: dict "root" $ "group" name */}}
{{- define "mayfly.engine.selector" -}}
{{ include "mayfly.selector" .root }}
app.kubernetes.io/component: engine
mayfly/group: {{ .group | quote }}
{{- end -}}

{{- define "mayfly.engine.labels" -}}
{{ include "mayfly.labels" .root }}
app.kubernetes.io/component: engine
mayfly/group: {{ .group | quote }}
{{- end -}}

{{- define "mayfly.engine.fullname" -}}
{{ include "mayfly.fullname" .root }}-engine-{{ .group }}
{{- end -}}

{{/* KEDA takes names of 54 characters at most. */}}
{{- define "mayfly.engine.scaler" -}}
{{- $name := include "mayfly.engine.fullname" . -}}
{{- if gt (len $name) 54 -}}
{{- $name = printf "%s-%s" (trunc 45 $name | trimSuffix "-") (sha256sum $name | trunc 8) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* A group's values in place of those of all groups, as YAML. What a group says counts, also what is
empty; some values are made of several, each of which it may say. */}}
{{- define "mayfly.engine.values" -}}
{{- $values := deepCopy .root.Values.engineDefaults -}}
{{- range $key, $value := index .root.Values.engines .group -}}
{{- if has $key (list "amqp" "networkPolicy" "resources" "scaling" "serviceAccount") -}}
{{- range $part, $value := $value -}}
{{- $_ := set (index $values $key) $part $value -}}
{{- end -}}
{{- else -}}
{{- $_ := set $values $key $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $values -}}
{{- end -}}

{{/* dict "root" $ "repository" name */}}
{{- define "mayfly.image" -}}
{{- with .root.Values.image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{ .repository }}:{{ default .root.Chart.AppVersion .root.Values.image.tag }}
{{- end -}}

{{/* The secret with the AMQP URL: dict "root" $ "own" (the component's amqp values) */}}
{{- define "mayfly.amqp.secret" -}}
{{- $name := .own.existingSecret -}}
{{- if and (not $name) .root.Values.rabbitmqCluster.create -}}
{{- fail "rabbitmqCluster.create: each part needs a user of its own; name its secret with dispatcher.amqp.existingSecret and engines.GROUP.amqp.existingSecret (deploy/rabbitmq/users.sh makes the users)" -}}
{{- end -}}
{{- $name = default .root.Values.amqp.existingSecret $name -}}
{{- if not $name -}}
{{- fail "amqp.existingSecret: name the secret with RabbitMQ's URL, or let rabbitmqCluster.create make a cluster" -}}
{{- end -}}
{{- if eq $name (printf "%s-rabbitmq-default-user" (include "mayfly.fullname" .root)) -}}
{{- fail (printf "amqp.existingSecret: %s is RabbitMQ's administrator; no part needs that" $name) -}}
{{- end -}}
{{ $name }}
{{- end -}}

{{- define "mayfly.amqp.key" -}}
{{- if .own.existingSecret -}}
{{ .own.existingSecretKey }}
{{- else -}}
{{ .root.Values.amqp.existingSecretKey }}
{{- end -}}
{{- end -}}

{{- define "mayfly.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "mayfly.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
privileged: false
capabilities:
  drop: [ALL]
{{- end -}}

{{/* What every process gets, as environment: dict "root" $ */}}
{{- define "mayfly.env" -}}
- name: MAYFLY__AMQP__URL_FILE
  value: /etc/mayfly/amqp/url
- name: MAYFLY__LOG__LEVEL
  value: {{ .root.Values.log.level | quote }}
- name: MAYFLY__LOG__FORMAT
  value: {{ .root.Values.log.format | quote }}
{{- with .root.Values.traces.endpoint }}
- name: MAYFLY__TRACES__ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- if .root.Values.amqp.caSecret }}
- name: SSL_CERT_FILE
  value: /etc/mayfly/amqp-ca/ca.crt
{{- end }}
{{- end -}}

{{- define "mayfly.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: admin}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: admin}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: admin}
  periodSeconds: 3
  timeoutSeconds: 3
  failureThreshold: 2
{{- end -}}

{{/* Volumes and mounts of the AMQP secret: dict "root" $ "own" (the component's amqp values) */}}
{{- define "mayfly.amqp.volumes" -}}
- name: amqp
  secret:
    secretName: {{ include "mayfly.amqp.secret" . | quote }}
    defaultMode: 0440
    items:
      - {key: {{ include "mayfly.amqp.key" . | quote }}, path: url}
{{- with .root.Values.amqp.caSecret }}
- name: amqp-ca
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0444
{{- end }}
{{- end -}}

{{- define "mayfly.amqp.mounts" -}}
- {name: amqp, mountPath: /etc/mayfly/amqp, readOnly: true}
{{- if .root.Values.amqp.caSecret }}
- {name: amqp-ca, mountPath: /etc/mayfly/amqp-ca, readOnly: true}
{{- end }}
{{- end -}}

{{- define "mayfly.dispatcher.volumes" -}}
{{- $d := .Values.dispatcher -}}
- name: keys
  secret:
    secretName: {{ $d.existingSecret | quote }}
    defaultMode: 0440
    items:
      - {key: master-key, path: master-key}
      - {key: root-token, path: root-token}
- name: data
  {{- if eq $d.store.type "sqlite" }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-dispatcher" (include "mayfly.fullname" .)) $d.persistence.existingClaim | quote }}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- if eq $d.store.type "postgresql" }}
- name: store
  secret:
    secretName: {{ $d.store.existingSecret | quote }}
    defaultMode: 0440
    items:
      - {key: {{ $d.store.existingSecretKey | quote }}, path: url}
{{- with $d.store.caSecret }}
- name: store-ca
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0444
{{- end }}
{{- end }}
{{ include "mayfly.amqp.volumes" (dict "root" . "own" $d.amqp) }}
{{- end -}}

{{/* dict "root" $ "values" (the group's) */}}
{{- define "mayfly.engine.volumes" -}}
- name: pool
  secret:
    secretName: {{ .values.existingSecret | quote }}
    defaultMode: 0440
    items:
      - {key: {{ .values.existingSecretKey | quote }}, path: key}
{{ include "mayfly.amqp.volumes" (dict "root" .root "own" .values.amqp) }}
{{- end -}}

{{/* The sum of what the Secrets of a pod's volumes hold, so that an upgrade replaces the pod when one has
changed: dict "root" $ "volumes" (as YAML). It goes over all of them together, and the first item of the first volume
is a key of 32 random bytes: without it there is no sum, as it would tell of a password. Where nothing is to be
looked up, as in `helm template`, it is always the same. */}}
{{- define "mayfly.secretsSum" -}}
{{- $volumes := fromYamlArray .volumes -}}
{{- $held := list -}}
{{- range $volumes -}}
{{- with .secret -}}
{{- $held = append $held (lookup "v1" "Secret" $.root.Release.Namespace .secretName).data -}}
{{- end -}}
{{- end -}}
{{- $key := (first (first $volumes).secret.items).key -}}
{{- if not (get (default dict (first $held)) $key) -}}
{{- $held = list -}}
{{- end -}}
{{- toJson $held | sha256sum -}}
{{- end -}}

{{/* Where pods go: dict "values" (the component's) "selector" (its selector, as YAML) */}}
{{- define "mayfly.placement" -}}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
affinity:
  {{- if .values.affinity }}
  {{- toYaml .values.affinity | nindent 2 }}
  {{- else }}
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              {{- .selector | nindent 14 }}
  {{- end }}
{{- end -}}

{{/* Egress to names, the broker and the collector of traces. */}}
{{- define "mayfly.egress" -}}
- ports:
    - {port: 53, protocol: UDP}
    - {port: 53, protocol: TCP}
- ports:
    {{- range .Values.networkPolicy.amqpPorts }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
  {{- with .Values.networkPolicy.amqpTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- if .Values.traces.endpoint }}
- ports:
    {{- $url := urlParse .Values.traces.endpoint }}
    {{- $named := regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) }}
    - {port: {{ coalesce .Values.networkPolicy.tracesPort $named (ternary 443 80 (eq $url.scheme "https")) }}, protocol: TCP}
{{- end }}
{{- end -}}

{{/* A dashboard under a key, a title and a uid (of 40 characters at most) that no other release's has, for
this release's namespace: dict "root" $ "suffix" (of the key) "board" (its JSON) */}}
{{- define "mayfly.dashboard" -}}
{{- $namespace := .root.Release.Namespace -}}
{{- $name := include "mayfly.fullname" .root -}}
{{- $key := printf "%s.%s%s" $namespace $name .suffix -}}
{{- $board := fromJson .board -}}
{{- $_ := set $board "uid" (printf "mayfly-%s" (sha256sum $key | trunc 32)) -}}
{{- $_ := set $board "title" (printf "%s (%s/%s)" $board.title $namespace $name) -}}
{{- range $board.templating.list -}}
{{- if eq .name "namespace" -}}
{{- $_ := set . "current" (dict "text" (list $namespace) "value" (list $namespace)) -}}
{{- end -}}
{{- end -}}
{{ $key }}.json: |-
  {{- toRawJson $board | nindent 2 }}
{{- end -}}

{{- define "mayfly.metricsIngress" -}}
- ports:
    - {port: admin, protocol: TCP}
  from:
    {{- if .Values.networkPolicy.metricsFrom }}
    {{- toYaml .Values.networkPolicy.metricsFrom | nindent 4 }}
    {{- else }}
    - namespaceSelector: {}
    {{- end }}
{{- end -}}
