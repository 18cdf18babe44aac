{{- define "mayfly.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "mayfly.longname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains (include "mayfly.name" .) .Release.Name -}}
{{- .Release.Name -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "mayfly.name" .) -}}
{{- end -}}
{{- end -}}

{{/* At most 40 characters. A longer name ends in its hash, so that two names with the same beginning differ. */}}
{{- define "mayfly.fullname" -}}
{{- $name := include "mayfly.longname" . -}}
{{- if gt (len $name) 40 -}}
{{- $name = printf "%s-%s" (trunc 31 $name | trimSuffix "-") (sha256sum $name | trunc 8) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* Whether the cluster is OpenShift; empty: no. */}}
{{- define "mayfly.openshift" -}}
{{- if or (.Capabilities.APIVersions.Has "security.openshift.io/v1") (.Capabilities.APIVersions.Has "route.openshift.io/v1") -}}
yes
{{- end -}}
{{- end -}}

{{/* The metadata of an object: dict "root" $ "name" its "labels" its (as YAML) "annotations" its */}}
{{- define "mayfly.metadata" -}}
name: {{ .name | quote }}
labels:
  {{- .labels | nindent 2 }}
{{- with merge (dict) (default dict .annotations) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* The labels by which pods are selected. They never change: an upgrade would be refused. */}}
{{- define "mayfly.selector" -}}
app.kubernetes.io/name: {{ include "mayfly.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "mayfly.labels" -}}
{{- include "mayfly.labelsAnd" (dict "root" . "labels" dict) -}}
{{- end -}}

{{/* The labels of one object: dict "root" $ "labels" them */}}
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
{{ include "mayfly.dispatcher.labelsAnd" (dict "root" . "labels" dict) }}
{{- end -}}

{{- define "mayfly.dispatcher.labelsAnd" -}}
{{ include "mayfly.labelsAnd" . }}
app.kubernetes.io/component: dispatcher
{{- end -}}

{{/* With the root and the group's name: dict "root" $ "group" name */}}
{{- define "mayfly.engine.selector" -}}
{{ include "mayfly.selector" .root }}
app.kubernetes.io/component: engine
mayfly/group: {{ .group | quote }}
{{- end -}}

{{- define "mayfly.engine.labels" -}}
{{ include "mayfly.engine.labelsAnd" (dict "root" .root "group" .group "labels" dict) }}
{{- end -}}

{{- define "mayfly.engine.labelsAnd" -}}
{{ include "mayfly.labelsAnd" . }}
app.kubernetes.io/component: engine
mayfly/group: {{ .group | quote }}
{{- end -}}

{{- define "mayfly.engine.fullname" -}}
{{ include "mayfly.fullname" .root }}-engine-{{ .group }}
{{- end -}}

{{/* KEDA accepts names of at most 54 characters. */}}
{{- define "mayfly.engine.scaler" -}}
{{- $name := include "mayfly.engine.fullname" . -}}
{{- if gt (len $name) 54 -}}
{{- $name = printf "%s-%s" (trunc 45 $name | trimSuffix "-") (sha256sum $name | trunc 8) -}}
{{- end -}}
{{- $name -}}
{{- end -}}
