{{/* The names of the groups of engines, as YAML. A group that is null is none. */}}
{{- define "mayfly.groups" -}}
{{- $names := list -}}
{{- range $name, $group := .Values.engines -}}
{{- if not (kindIs "invalid" $group) -}}
{{- $names = append $names $name -}}
{{- end -}}
{{- end -}}
{{- toYaml (sortAlpha $names) -}}
{{- end -}}

{{/* One map over another key by key, as YAML; a key that is null is taken away: dict "under" "over" */}}
{{- define "mayfly.over" -}}
{{- $values := deepCopy .under -}}
{{- range $key, $value := .over -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := unset $values $key -}}
{{- else -}}
{{- $_ := set $values $key $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $values -}}
{{- end -}}

{{/* A group's values in place of those of all groups, as YAML. What a group says counts, also what is
empty; some values are made of several, each of which it may say. */}}
{{- define "mayfly.engine.values" -}}
{{- $values := deepCopy .root.Values.engineDefaults -}}
{{- range $key, $value := index .root.Values.engines .group -}}
{{- if eq $key "resources" -}}
{{- range $part, $value := $value -}}
{{- $both := dict "under" (default dict (index $values.resources $part)) "over" (default dict $value) -}}
{{- $_ := set $values.resources $part (fromYaml (include "mayfly.over" $both)) -}}
{{- end -}}
{{- else if has $key (list "amqp" "networkPolicy" "scaling" "serviceAccount" "podSecurityContext" "containerSecurityContext") -}}
{{- range $part, $value := $value -}}
{{- $_ := set (index $values $key) $part $value -}}
{{- end -}}
{{- else -}}
{{- $_ := set $values $key $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $values -}}
{{- end -}}

{{/* dict "root" $ "values" (those with image, imageTag and imageDigest) */}}
{{- define "mayfly.image" -}}
{{- with .root.Values.image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- .values.image -}}
{{- with .values.imageDigest -}}
@{{ . }}
{{- else -}}
:{{ coalesce .values.imageTag .root.Values.image.tag .root.Chart.AppVersion }}
{{- end -}}
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

{{/* The secret with the certificate to show to RabbitMQ; may be empty: dict "root" $ "own" (the component's amqp values) */}}
{{- define "mayfly.amqp.clientCert" -}}
{{- default .root.Values.amqp.clientCertSecret .own.clientCertSecret -}}
{{- end -}}

{{/* Where the API is, as pods of the release's namespace reach it. */}}
{{- define "mayfly.dispatcher.address" -}}
{{- $name := printf "%s-dispatcher" (include "mayfly.fullname" .) -}}
{{- $port := int64 .Values.dispatcher.service.port -}}
{{- if .Values.dispatcher.tlsSecret -}}
{{- printf "https://%s.%s.svc:%d" $name .Release.Namespace $port -}}
{{- else -}}
{{- printf "http://%s:%d" $name $port -}}
{{- end -}}
{{- end -}}

{{- define "mayfly.amqp.key" -}}
{{- if .own.existingSecret -}}
{{ .own.existingSecretKey }}
{{- else -}}
{{ .root.Values.amqp.existingSecretKey }}
{{- end -}}
{{- end -}}

{{/* Fails where what is added has a name of the chart's or twice the same, which the API server refuses:
dict "all" (a list of volumes or containers) "at" (the value that adds them) */}}
{{- define "mayfly.distinct" -}}
{{- $seen := dict -}}
{{- range .all -}}
{{- if hasKey $seen .name -}}
{{- fail (printf "%s: there is a %s already; choose another name" $.at .name) -}}
{{- end -}}
{{- $_ := set $seen .name true -}}
{{- end -}}
{{- end -}}

{{/* The service account: dict "values" (the component's) "name" (of the Deployment) */}}
{{- define "mayfly.account" -}}
{{- default .name .values.serviceAccount.name -}}
{{- end -}}
