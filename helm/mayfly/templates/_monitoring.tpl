{{/* The PodMonitors by name, as YAML: one for all pods without TLS, and one for each part with a certificate,
with the name of its Deployment. Each value is the labels of its pods. */}}
{{- define "mayfly.monitors" -}}
{{- $fullname := include "mayfly.fullname" . -}}
{{- $monitors := dict -}}
{{- $plain := list -}}
{{- $encrypted := list -}}
{{- $d := .Values.dispatcher -}}
{{- if and $d.enabled $d.tlsSecret -}}
{{- $pods := list (dict "key" "app.kubernetes.io/component" "operator" "In" "values" (list "dispatcher")) -}}
{{- $_ := set $monitors (printf "%s-dispatcher" $fullname) (dict "pods" $pods "secret" $d.tlsSecret "caKey" $d.tlsCaKey) -}}
{{- else if $d.enabled -}}
{{- $plain = append $plain "dispatcher" -}}
{{- end -}}
{{- range $group := fromYamlArray (include "mayfly.groups" .) -}}
{{- $at := dict "root" $ "group" $group -}}
{{- $e := fromYaml (include "mayfly.engine.values" $at) -}}
{{- if $e.tlsSecret -}}
{{- $encrypted = append $encrypted $group -}}
{{- $pods := list (dict "key" "mayfly/group" "operator" "In" "values" (list $group)) -}}
{{- $_ := set $monitors (include "mayfly.engine.fullname" $at) (dict "pods" $pods "secret" $e.tlsSecret "caKey" $e.tlsCaKey) -}}
{{- else if not (has "engine" $plain) -}}
{{- $plain = append $plain "engine" -}}
{{- end -}}
{{- end -}}
{{- if $plain -}}
{{- $pods := list (dict "key" "app.kubernetes.io/component" "operator" "In" "values" $plain) -}}
{{- if $encrypted -}}
{{- $pods = append $pods (dict "key" "mayfly/group" "operator" "NotIn" "values" $encrypted) -}}
{{- end -}}
{{- $_ := set $monitors $fullname (dict "pods" $pods) -}}
{{- end -}}
{{- toYaml $monitors -}}
{{- end -}}

{{/* An expression of the rules, limited to the release's namespace: dict "root" $ "expr" it */}}
{{- define "mayfly.expression" -}}
{{- $here := printf "{namespace=%q}" .root.Release.Namespace -}}
{{- regexReplaceAll "\\b(mayfly[_:][a-zA-Z0-9_:]+)" .expr (printf "${1}%s" $here) | replace "}{" "," -}}
{{- end -}}

{{/* A dashboard for this release's namespace, with a key, a title and a uid (at most 40 characters) that no
other release has: dict "root" $ "suffix" (of the key) "board" (its JSON) */}}
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
