// What `ollama create` writes for a GGUF file and a parsed Modelfile, by Go's own encoder.
//
// The structures carry the json tags of types/model/config.go, manifest/manifest.go, manifest/layer.go
// and api/types.go; the steps are those of parser.CreateRequest (client), json over the wire, and
// server/create.go with create/manifest.go. Standard library only. Standard input: a request;
// standard output: the blobs in the order of the manifest, the configuration and the manifest.
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
)

type request struct {
	File, Digest, Family, FileType string
	Size                           int64
	Parameters                     uint64
	Commands                       [][2]string
}

type configV2 struct {
	ModelFormat   string   `json:"model_format"`
	ModelFamily   string   `json:"model_family"`
	ModelFamilies []string `json:"model_families"`
	ModelType     string   `json:"model_type"`
	FileType      string   `json:"file_type"`
	Renderer      string   `json:"renderer,omitempty"`
	Parser        string   `json:"parser,omitempty"`
	Requires      string   `json:"requires,omitempty"`
	RemoteHost    string   `json:"remote_host,omitempty"`
	RemoteModel   string   `json:"remote_model,omitempty"`
	Capabilities  []string `json:"capabilities,omitempty"`
	ContextLen    int      `json:"context_length,omitempty"`
	EmbedLen      int      `json:"embedding_length,omitempty"`
	BaseName      string   `json:"base_name,omitempty"`
}

type layer struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int64  `json:"size"`
	From      string `json:"from,omitempty"`
	Name      string `json:"name,omitempty"`
}

type manifest struct {
	SchemaVersion int     `json:"schemaVersion"`
	MediaType     string  `json:"mediaType"`
	Config        layer   `json:"config"`
	Layers        []layer `json:"layers"`
	Runner        string  `json:"runner,omitempty"`
	Format        string  `json:"format,omitempty"`
}

type createRequest struct {
	Files      map[string]string `json:"files,omitempty"`
	Template   string            `json:"template,omitempty"`
	License    any               `json:"license,omitempty"`
	System     string            `json:"system,omitempty"`
	Parameters map[string]any    `json:"parameters,omitempty"`
}

// The kinds of the fields of api.Options and api.Runner.
var kinds = map[string]string{
	"num_keep": "int", "seed": "int", "num_predict": "int", "top_k": "int", "top_p": "float32",
	"min_p": "float32", "repeat_last_n": "int", "temperature": "float32",
	"repeat_penalty": "float32", "presence_penalty": "float32", "frequency_penalty": "float32",
	"stop": "slice", "num_ctx": "int", "num_batch": "int", "num_gpu": "int", "main_gpu": "int",
	"use_mmap": "pointer", "num_thread": "int",
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func format(kind, value string) any {
	switch kind {
	case "float32":
		f, err := strconv.ParseFloat(value, 32)
		check(err)
		return float32(f)
	case "int":
		i, err := strconv.ParseInt(value, 10, 64)
		check(err)
		return i
	case "pointer":
		b, err := strconv.ParseBool(value)
		check(err)
		return &b
	}
	check(fmt.Errorf("no kind %q", kind))
	return nil
}

func client(r request) createRequest {
	c := createRequest{Files: map[string]string{filepath.Base(r.File): r.Digest}}
	parameters, licenses := map[string]any{}, []string{}
	for _, command := range r.Commands {
		name, args := command[0], command[1]
		switch name {
		case "model":
		case "template":
			c.Template = args
		case "system":
			c.System = args
		case "license":
			licenses = append(licenses, args)
		case "stop":
			stops, _ := parameters[name].([]string)
			parameters[name] = append(stops, args)
		default:
			parameters[name] = format(kinds[name], args)
		}
	}
	if len(parameters) > 0 {
		c.Parameters = parameters
	}
	if len(licenses) > 0 {
		c.License = licenses
	}
	return c
}

func human(n uint64) string {
	const thousand, million, billion = 1000, 1000000, 1000000000
	switch {
	case n >= billion:
		f := float64(n) / billion
		if f == math.Floor(f) {
			return fmt.Sprintf("%.0fB", f)
		}
		return fmt.Sprintf("%.1fB", f)
	case n >= million:
		f := float64(n) / million
		if f == math.Floor(f) {
			return fmt.Sprintf("%.0fM", f)
		}
		return fmt.Sprintf("%.2fM", f)
	case n >= thousand:
		return fmt.Sprintf("%.0fK", float64(n)/thousand)
	}
	return strconv.FormatUint(n, 10)
}

func encode(v any) []byte {
	var b bytes.Buffer
	check(json.NewEncoder(&b).Encode(v))
	return b.Bytes()
}

func main() {
	var r request
	check(json.NewDecoder(os.Stdin).Decode(&r))
	var s createRequest // what the server gets
	check(json.Unmarshal(encode(client(r)), &s))

	var blobs [][]byte
	add := func(layers []layer, kind string, data []byte) []layer {
		blobs = append(blobs, data)
		digest := fmt.Sprintf("sha256:%x", sha256.Sum256(data))
		return append(layers, layer{MediaType: kind, Digest: digest, Size: int64(len(data))})
	}
	var layers []layer
	for name, digest := range s.Files {
		kind := "application/vnd.ollama.image.model"
		layers = append(layers, layer{MediaType: kind, Digest: digest, Size: r.Size, From: name})
	}
	if s.Template != "" {
		layers = add(layers, "application/vnd.ollama.image.template", []byte(s.Template))
	}
	if s.System != "" {
		layers = add(layers, "application/vnd.ollama.image.system", []byte(s.System))
	}
	if licenses, ok := s.License.([]any); ok {
		for _, text := range licenses {
			layers = add(layers, "application/vnd.ollama.image.license", []byte(text.(string)))
		}
	}
	if len(s.Parameters) > 0 {
		layers = add(layers, "application/vnd.ollama.image.params", encode(s.Parameters))
	}
	config := encode(configV2{
		ModelFormat: "gguf", ModelFamily: r.Family, ModelFamilies: []string{r.Family},
		ModelType: human(r.Parameters), FileType: r.FileType,
	})
	head := add(nil, "application/vnd.docker.container.image.v1+json", config)[0]
	m := encode(manifest{
		SchemaVersion: 2, MediaType: "application/vnd.docker.distribution.manifest.v2+json",
		Config: head, Layers: layers,
	})
	check(json.NewEncoder(os.Stdout).Encode(map[string]any{"blobs": blobs, "manifest": m}))
}
