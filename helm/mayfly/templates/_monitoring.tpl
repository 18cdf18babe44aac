{{/* An expression of the rules, of the release's namespace alone: dict "root" $ "expr" it */}}
{{- define "mayfly.expression" -}}
{{- $here := printf "{namespace=%q}" .root.Release.Namespace -}}
{{- regexReplaceAll "\\b(mayfly[_:][a-zA-Z0-9_:]+)" .expr (printf "${1}%s" $here) | replace "}{" "," -}}
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
