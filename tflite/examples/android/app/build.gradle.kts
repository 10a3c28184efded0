plugins {
    id("com.android.application")
    id("org.jetbrains.kotlin.android")
}

android {
    namespace = "org.messtf.example"
    compileSdk = 35

    defaultConfig {
        applicationId = "org.messtf.example"
        minSdk = 28
        targetSdk = 35
        versionCode = 1
        versionName = "1.0"
    }

    // Where LiteRT comes from: bundled, in the app; play, from Google Play services.
    flavorDimensions += "runtime"
    productFlavors {
        create("bundled") { dimension = "runtime" }
        create("play") { dimension = "runtime" }
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }

    // LiteRT maps the file from the assets.
    androidResources { noCompress += "tflite" }
}

kotlin { jvmToolchain(17) }

dependencies {
    "bundledImplementation"("com.google.ai.edge.litert:litert:2.1.5")
    "playImplementation"("com.google.android.gms:play-services-litert:17.0.0")
}
