//! Generates `selam.example.Greeter` without a `.proto` file, so that the example builds without `protoc`.

use tonic_build::manual::{Builder, Method, MethodBuilder, Service};

fn main() {
    let method = |name: &str, route: &str| -> MethodBuilder {
        Method::builder()
            .name(name)
            .route_name(route)
            .input_type("crate::Name")
            .output_type("crate::Greeting")
            .codec_path("tonic_prost::ProstCodec")
    };
    let greeter = Service::builder()
        .package("selam.example")
        .name("Greeter")
        .method(method("greet", "Greet").build())
        .method(method("greet_in_every_language", "GreetInEveryLanguage").server_streaming().build())
        .method(method("greet_all", "GreetAll").client_streaming().build())
        .method(method("converse", "Converse").client_streaming().server_streaming().build())
        .method(method("forget", "Forget").build())
        .build();
    Builder::new().build_transport(false).compile(&[greeter]);
}
